"""Every family that capabilities.yaml claims, as a tiny random model: through download's check, plan, and each backend.

The models are made in one process of the reference environment, and each backend quantizes all of its families in one. What
plan says, the stage says, too.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from places import CPU
from tiny_model import write_tokenizer
from tiny_quantized import write_float

from quantline.checkpoints.model_config import read_config
from quantline.config.data import ModelConfig
from quantline.core.errors import UserError
from quantline.data.download import fetch
from quantline.pipeline.preflight import method_defaults
from quantline.planning.preflight import check
from quantline.planning.report import as_text
from quantline.planning.spec import Machine, Model, VariantSpec
from quantline.quantization import capabilities
from quantline.quantization.file_checks import inspect
from quantline.quantization.quantize import Request, check_output, quantize
from quantline.toolchains import environments, runner
from quantline.toolchains.toolchain import worker_environment

# Families that only the native backend takes, which says that it takes any; and some that plan and stage refuse.
ANY = ("falcon", "gemma3", "mamba", "mistral3", "qwen2_5_vl")
REFUSED = {"gpt2": "stored transposed", "gpt_oss": "no linears of their own", "granitemoe": "no linears of their own"}
BACKENDS = [name for name, entry in capabilities.table().items() if entry["toolchain"]]
SCRIPTS = Path(__file__).parents[1] / "toolchains" / "workers" / "quantizers" / "scripts"
BITS, GROUP = {"fp8": 8, "mxfp8": 8}, {"fp8": -1, "fp4": 16, "mxfp8": 32}
# Few steps of learning, and what the backend does not have; the rest as in conf/.
OWN_OPTIONS = {"autoround": {"iters": 2}, "llmcompressor": {"clip": False}}

pytestmark = [pytest.mark.toolchain("reference")]


def claims(backend: str) -> list[tuple[str, str]]:
    """(method, family) of everything that a backend says it can do."""
    methods = capabilities.table()[backend]["methods"]
    return [(method, kind) for method in methods for kind in capabilities.able(backend, method)["families"] or ()]


CLAIMED = sorted({kind for name in BACKENDS for _, kind in claims(name)})


@pytest.fixture(scope="module")
def models(root, tmp_path_factory):
    """<family>/{model, tokens.safetensors, probe.safetensors}; that the probe is there is download's check."""
    folder = tmp_path_factory.mktemp("families")
    python = environments.ensure(root, "reference").python
    command = [python, root / "tests" / "support" / "make_families.py", folder, *CLAIMED, *ANY, *REFUSED]
    done = subprocess.run(command, env=worker_environment(1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for family in (*CLAIMED, *ANY, *REFUSED):
        write_tokenizer(folder / family / "model")
    return folder


@pytest.fixture(scope="module")
def options(root):
    return method_defaults(root)


def spec_of(method: str, options: dict[str, Any], backend: str) -> VariantSpec:
    return VariantSpec(method, BITS.get(method, 4), GROUP.get(method, 64), options, backend)


def asked(spec: VariantSpec) -> Request:
    """What plan was asked, asked of the stage."""
    return Request(
        {"name": spec.method, **spec.options}, spec.bits, spec.group_size, spec.backend, [spec.backend], spec.requirements,
        threads=1,
    )  # fmt: skip


class NotYetError(Exception):
    """Carries a job that would be run now."""


def refuse_to_run(toolchain: str, module: str, job: dict[str, Any], label: str) -> Any:
    raise NotYetError(job)


def stage(spec: VariantSpec, folder: Path, out: Path, run_worker: Any = refuse_to_run) -> Any:
    out.mkdir(parents=True)
    return quantize(
        asked(spec), model=folder / "model", probe=folder / "probe.safetensors", calibration=folder / "tokens.safetensors",
        out=out, work=out.with_name(f"{out.name}-work"), run_worker=run_worker,
    )  # fmt: skip


CONFIGS = """
import json, sys
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
found = {}
for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
    try:
        found[family] = json.loads(CONFIG_MAPPING[family]().to_json_string(use_diff=False))
    except Exception:  # some have no defaults
        continue
json.dump(found, open(sys.argv[1], "w"))
"""


def test_plan_answers_for_every_causal_family_of_transformers(root, options, tmp_path):
    python = environments.ensure(root, "reference").python
    command = [python, "-c", CONFIGS, tmp_path / "configs.json"]
    subprocess.run(command, env=worker_environment(1), capture_output=True, check=True)
    configs = json.loads((tmp_path / "configs.json").read_text())
    assert len(configs) > 150
    headers = Model.open(write_float(tmp_path / "model"))
    here = Machine(CPU, {"rtn": ["native"], "gptq": ["gptqmodel"]}, memory_bytes=2**40)
    unknown = set()
    for family, config in configs.items():
        model = Model(family, headers.checkpoint, {**config, "model_type": family})
        for method in ("rtn", "gptq", "float"):
            plan = check(spec_of(method, options.get(method, {}), "auto"), model, here)
            assert as_text(plan, model, here, None, None), family
        unknown |= {family} if plan.kv is None else set()
    # Those without heads, and those whose numbers are in several sections.
    assert unknown <= {"blt", "falcon_mamba", "gemma4_assistant", "gemma4_unified_assistant", "mamba", "rwkv"}


@pytest.mark.parametrize("family", [*CLAIMED, *ANY, *REFUSED])
def test_a_family_is_downloaded_planned_and_rounded_or_refused_by_plan_and_stage_alike(
    models, options, tmp_path, family
):
    source = ModelConfig(
        name=None, repo=None, revision=None, path=str(models / family / "model"), allow_pickle=False,
        trust_remote_code=False,
    )  # fmt: skip
    report = fetch(source, tmp_path / "model")
    assert report["model_type"] == family
    spec = spec_of("rtn", options["rtn"], "native")
    plan = check(spec, Model.open(models / family / "model"), Machine(CPU, {"rtn": ["native"]}))
    if family in REFUSED:
        assert not plan.passes("quantize")
        with pytest.raises(UserError, match=REFUSED[family]):
            stage(spec, models / family, tmp_path / "out")
        return
    assert plan.passes("quantize", "convert"), plan.refused
    outcome = stage(spec, models / family, tmp_path / "out")
    found = inspect(models / family / "model", tmp_path / "out", list(outcome.linears))
    assert found.faults == []
    assert found.expected == len(outcome.linears) > 0


@pytest.mark.parametrize("backend", [pytest.param(name, marks=pytest.mark.toolchain(name)) for name in BACKENDS])
def test_a_backend_quantizes_every_family_that_it_claims(root, models, options, tmp_path, backend):
    jobs = {}
    for method, family in claims(backend):
        own = {key: value for key, value in OWN_OPTIONS.get(backend, {}).items() if key in options[method]}
        spec = spec_of(method, {**options[method], **own}, backend)
        plan = check(spec, Model.open(models / family / "model"), Machine(CPU, {method: [backend]}))
        if not plan.passes("quantize", "convert"):
            reasons = capabilities.family_faults(backend, spec.requirements, read_config(models / family / "model"))
            assert reasons, (method, family, plan.refused)  # an exception of the table
            continue
        with pytest.raises(NotYetError) as ready:
            stage(spec, models / family, tmp_path / f"{method}-{family}")
        (jobs[f"{method}-{family}"],) = ready.value.args
        (tmp_path / f"{method}-{family}").rmdir()
    results = runner.run_worker(
        environments.ensure(root, capabilities.toolchain_of(backend)), "batch", {"backend": backend, "jobs": jobs},
        log=tmp_path / "log", threads=1, label=backend,
        extra_environment={"PYTHONPATH": f"{root / 'src'}:{SCRIPTS}"},
    ).data  # fmt: skip
    wrong = {label: result["refused"] for label, result in results.items() if "refused" in result}
    print(
        {label: result["metrics"].get("probe_quantized_rms") for label, result in results.items() if label not in wrong}
    )
    assert wrong == {}
    faults = {}
    for label, job in jobs.items():
        check_output(Path(job["output"]), widths_of(job))
        faults[label] = inspect(Path(job["model"]), Path(job["output"]), list(job["linears"])).faults
    assert {label: found for label, found in faults.items() if found} == {}


def widths_of(job: dict[str, Any]) -> dict[str, Any]:
    from quantline.checkpoints.layouts.linear_spec import LinearSpec

    return {name: LinearSpec(**width) for name, width in job["linears"].items()}
