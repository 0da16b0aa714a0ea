"""Every rule about the vLLM on this machine, asked of that vLLM: tiny checkpoints that it loads, or does not.

One process imports vLLM once and loads them one after the other, by vLLM's own engine configuration and model loader. Where
one loads, its linears also have to compute what its codes stand for.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from checkout_paths import interpreter
from packaging.version import Version
from tiny_quantized import LAYER, mlp_of, shapes_of, write_quantized

from quantline.checkpoints.quantization_config import LayerSettings
from quantline.serving.checkpoint_facts import facts_of_layers
from quantline.serving.rules import (
    CheckpointFacts,
    Target,
    architecture_note,
    cpu_has_amx,
    cpu_instructions,
    rules,
    serves_text_alone,
    verdicts,
)
from quantline.toolchains.toolchain import worker_environment

PYTHON = interpreter("vllm")

pytestmark = [
    pytest.mark.toolchain("vllm"),
]

# Linears that load compute within 0.003 in bfloat16, and within 0.009 where activations are rounded to 8 bits. AWQ's
# codes without their zero points came to 0.4.
WRONG = 0.05
# What no checkpoint can show on this machine.
UNSEEN = {
    "cpu-instructions": "a CPU with neither AVX-512 nor AVX2",
    "architecture": "the registry is asked for every class, below",
    **dict.fromkeys(
        (
            "architecture-on-cpu",
            "architecture-of-transformers",
            "architecture-float16",
            "architecture-float16-on-cpu",
            "multi-query-of-transformers",
            "bloom-qkv",
            "experts-without-gate-on-cpu",
            "gptq-fused-unnamed",
            "llama4-packed",
            "llama4-zero-points",
        ),
        "of families, see test_families_vllm.py",
    ),
    "exl3": "no method of vLLM's, see tests/checkpoints/layouts/test_exl3.py",
    "gguf": "of a file that the stages give to llama.cpp",
    "kv-cache-cpu": "of the server's cache, see test_kv_cache_vllm.py",
    **dict.fromkeys(
        (
            "float-groups-cpu",
            "fp8-cpu-blocks",
            "fp8-cpu-experts",
            "fp8-cpu-fixed-inputs",
            "fp8-fused-blocks",
            "modelopt-cpu",
            "w4afp8-cpu",
            "w4afp8-group-size",
        ),
        "of float8 and ModelOpt, see test_rules.py and the tests of their layouts",
    ),
    **dict.fromkeys(
        ("cpu-offload-without-gpu", "kv-offload-without-gpu", "cpu-attention-backend"),
        "of the process, no checkpoint's",
    ),
}
REGISTRY = """
import json, sys
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models import registry
own = {*registry._TEXT_GENERATION_MODELS, *registry._MULTIMODAL_MODELS, *registry._TRANSFORMERS_SUPPORTED_MODELS}
def taken(name):  # as the registry asks before it runs a class of transformers that it does not name
    model = getattr(transformers, name)
    return model.is_backend_compatible() or model._can_set_attn_implementation()
causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
lists = [sorted(own), sorted(filter(taken, causal - own)), sorted(causal), sorted(registry._MULTIMODAL_MODELS)]
json.dump(lists, open(sys.argv[1], "w"))
"""


@dataclass(frozen=True)
class Case:
    """A checkpoint, how it is to be loaded, and the rules that speak against it (none: it loads and computes)."""

    layout: str
    rules: tuple[str, ...] = ()
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    dtype: str = "bfloat16"
    ranks: int = 1
    asked_ranks: int | None = None
    avx512: bool = True
    write: Mapping[str, Any] = field(default_factory=dict)


def case(layout: str, *rule: str, **options: Any) -> Case:
    known = {key: options.pop(key) for key in tuple(options) if key in Case.__dataclass_fields__}
    return Case(layout, rule, **known, write=options)


Q_ONLY = {"self_attn.q_proj": LayerSettings(4, 64, True)}
QKV = {f"self_attn.{name}_proj": LayerSettings(4, 64, True) for name in "qkv"}
GATE_ONLY = {"mlp.gate_proj": LayerSettings(4, 64, True)}
REORDERED = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 128,
    "actorder": "group",
}

CASES = {
    # GPTQ
    "gptq": case("gptq"),
    "gptq float16": case("gptq", dtype="float16"),
    "gptq_v2": case("gptq_v2"),
    **{f"gptq g{size}": case("gptq", group_size=size) for size in (-1, 32, 64)},
    "gptq float32": case("gptq", "quantized-float32", dtype="float32"),
    "gptq w2": case("gptq", "gptq-bits", "gptq-cpu-bits", bits=2),
    "gptq w3": case("gptq", "gptq-bits", "gptq-cpu-bits", bits=3),
    "gptq w8": case("gptq", "gptq-cpu-bits", bits=8),
    "gptq asymmetric": case("gptq_v2", "gptq-asymmetric", sym=False),
    "gptq g16": case("gptq", "gptq-group-size", group_size=16),
    "gptq g256": case("gptq", "gptq-group-size", group_size=256),
    "gptq desc_act": case("gptq", "gptq-grouped-desc-act", says={"desc_act": True}),
    "gptq desc_act by channel": case("gptq", group_size=-1, says={"desc_act": True}),
    "gptq narrow": case("gptq", "cpu-layer-widths", group_size=-1, hidden=240, inner=480),
    "gptq, q alone in other groups": case("gptq", "fused-layers-differ", own=Q_ONLY),
    "gptq, gate alone in other groups": case("gptq", "fused-layers-differ", own=GATE_ONLY),
    "gptq, q, k and v in other groups": case("gptq", own=QKV),
    "gptq, down in other groups": case("gptq", own={"mlp.down_proj": LayerSettings(4, 32, True)}),
    "gptq, down at 8 bits": case("gptq", "gptq-cpu-bits", own={"mlp.down_proj": LayerSettings(8, 128, True)}),
    "gptq, q float": case("gptq", "fused-layers-differ", skip=["self_attn.q_proj"]),
    "gptq, q, k and v float": case("gptq", skip=list(QKV)),
    "gptq head": case("gptq", head=True, names_head=True),
    "gptq head, unsaid": case("gptq", "quantized-head-unnamed", head=True),
    "gptq experts": case("gptq", "cpu-experts", experts=4),
    "gptq, experts float": case("gptq", experts=4, skip=mlp_of(4)),
    # AWQ
    "awq": case("awq_gemm", sym=False),
    "awq float16": case("awq_gemm", sym=False, dtype="float16"),
    **{f"awq g{size}": case("awq_gemm", sym=False, group_size=size) for size in (-1, 16, 32, 64, 256)},
    "awq symmetric": case("awq_gemm"),
    "awq float32": case("awq_gemm", "quantized-float32", sym=False, dtype="float32"),
    "awq w8": case("awq_gemm", "awq-bits", sym=False, says={"bits": 8}),
    "awq gemv": case("awq_gemv", "awq-layout", sym=False),
    "awq zero_point=false": case("awq_gemm", "awq-cpu-zero-point", sym=False, says={"zero_point": False}),
    "awq narrow": case("awq_gemm", "cpu-layer-widths", sym=False, group_size=48, hidden=240, inner=480),
    "awq odd groups": case("awq_gemm", "cpu-odd-group-size", sym=False, group_size=9, hidden=288, inner=576),
    "awq, q float": case("awq_gemm", "fused-layers-differ", sym=False, skip=["self_attn.q_proj"]),
    "awq, q, k and v float": case("awq_gemm", sym=False, skip=list(QKV)),
    "awq head": case("awq_gemm", sym=False, head=True, names_head=True),
    "awq head, unsaid": case("awq_gemm", "quantized-head-unnamed", sym=False, head=True),
    "awq experts": case("awq_gemm", "cpu-experts", sym=False, experts=4),
    # compressed-tensors
    "ct experts": case("compressed_tensors", "cpu-experts", experts=4),
    "ct": case("compressed_tensors"),
    "ct float16": case("compressed_tensors", dtype="float16"),
    "ct asymmetric": case("compressed_tensors", sym=False),
    **{f"ct g{size}": case("compressed_tensors", group_size=size) for size in (-1, 16, 32, 256)},
    "ct float32": case("compressed_tensors", "compressed-tensors-cpu-float32", dtype="float32"),
    **{f"ct w{bits}": case("compressed_tensors", "compressed-tensors-cpu-bits", bits=bits) for bits in (2, 3, 8)},
    "ct w8 asymmetric": case("compressed_tensors", "compressed-tensors-cpu-bits", bits=8, sym=False),
    "ct reordered": case(
        "compressed_tensors", "compressed-tensors-desc-act",
        says={"config_groups": {"group_0": {"targets": ["Linear"], "weights": REORDERED}}},
    ),
    "ct narrow": case("compressed_tensors", "cpu-layer-widths", group_size=-1, hidden=240, inner=480),
    "ct odd groups": case("compressed_tensors", "cpu-odd-group-size", group_size=9, hidden=288, inner=576),
    "ct, q alone in other groups": case("compressed_tensors", "fused-layers-differ", own=Q_ONLY),
    "ct, q, k and v in other groups": case("compressed_tensors", own=QKV),
    "ct, q float": case("compressed_tensors", "fused-layers-differ", skip=["self_attn.q_proj"]),
    "ct, down float": case("compressed_tensors", skip=["mlp.down_proj"]),
    "ct head": case("compressed_tensors", head=True, names_head=True),
    "ct head, unsaid": case("compressed_tensors", "quantized-head-unnamed", head=True),
    # others
    "w8a8": case("w8a8", bits=8, group_size=-1),
    "w8a8 float32": case("w8a8", bits=8, group_size=-1, dtype="float32"),
    "w8a8 narrow": case("w8a8", bits=8, group_size=-1, hidden=240, inner=480),
    "msmodelslim": case("msmodelslim", "msmodelslim"),
    "bitsandbytes": case("bitsandbytes", "bitsandbytes", group_size=-1),
    # a CPU without AVX-512
    "gptq on AVX2": case("gptq", "cpu-int4-needs-avx512", avx512=False),
    "awq on AVX2": case("awq_gemm", "cpu-int4-needs-avx512", sym=False, avx512=False),
    "ct on AVX2": case("compressed_tensors", "cpu-int4-needs-avx512", avx512=False),
    "w8a8 on AVX2": case("w8a8", bits=8, group_size=-1, avx512=False),
    # tensor parallelism: a share of 192 inputs is no multiple of 128
    "gptq on 2": case("gptq", ranks=2),
    "gptq on 2, groups cut": case("gptq", "tensor-parallel-groups", ranks=2, inner=384),
    "gptq on 2, groups of 64": case("gptq", ranks=2, inner=384, group_size=64),
    "gptq on 2, by channel": case("gptq", ranks=2, inner=384, group_size=-1),
    "awq on 2": case("awq_gemm", ranks=2, sym=False),
    "awq on 2, groups cut": case("awq_gemm", "tensor-parallel-groups", ranks=2, sym=False, inner=384),
    "ct on 2": case("compressed_tensors", ranks=2),
    "ct on 2, groups cut": case("compressed_tensors", "tensor-parallel-groups", ranks=2, inner=384),
    "gptq on 3, heads cut": case("gptq", "tensor-parallel-heads", asked_ranks=3, inner=768, hidden=384),
}  # fmt: skip


def said_by_rules(name: str, config: Mapping[str, Any], version: str) -> tuple[str, ...]:
    """The rules that speak against a case, from the facts alone."""
    one = CASES[name]
    main = LayerSettings(one.bits, one.group_size, one.sym)
    own, skip = one.write.get("own", {}), one.write.get("skip", ())
    shapes = shapes_of(
        one.write.get("hidden", 256), one.write.get("inner", 512), head=one.write.get("head", False),
        experts=one.write.get("experts", 0),
    )  # fmt: skip
    short = {layer: layer.removeprefix(LAYER) for layer in shapes}
    linears = {layer: own.get(short[layer], main) for layer in shapes if short[layer] not in skip}
    # A config that says something else than the tensors hold is believed by vLLM, and by the facts.
    if "bits" in one.write.get("says", {}):
        linears = {layer: LayerSettings(one.write["says"]["bits"], one.group_size, one.sym) for layer in linears}
    ranks = one.asked_ranks or one.ranks
    target = Target(
        "vllm", version, "cpu", one.dtype, tensor_parallel_size=ranks, instructions="avx512" if one.avx512 else "avx2",
        amx=False,
    )  # fmt: skip
    found = facts_of_layers(config, linears, shapes, heads=4, tensor_parallel_size=ranks)
    return tuple(dict.fromkeys(known.rule_id for facts in found for known in verdicts(target, facts)))


@pytest.fixture(scope="module")
def version():
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if "cpu" not in found:
        pytest.skip("asks the build for CPUs")
    return found.partition("+")[0]


# A CPU without AVX-512 can only show what it lacks, one with AMX cannot show what experts need.
HERE = {
    name: one for name, one in CASES.items()
    if (cpu_instructions() not in ("avx2", "none") or not one.avx512) and not ("cpu-experts" in one.rules and cpu_has_amx())
}  # fmt: skip


@pytest.fixture(scope="module")
def seen(root, tmp_path_factory):
    """What vLLM does with each case: its quantization_config, the error or none, and how far off its linears are."""
    folder, configs, answers = tmp_path_factory.mktemp("checkpoints"), {}, {}
    for name, one in HERE.items():
        options = {"bits": one.bits, "group_size": one.group_size, "sym": one.sym, **one.write}
        configs[name] = write_quantized(folder / name, one.layout, **options)
    for avx512 in (True, False):
        runs = []
        for ranks in (1, 2):
            names = [name for name, one in HERE.items() if (one.avx512, one.ranks) == (avx512, ranks)]
            runs += [(ranks, names)] if names else []
        if not runs:
            continue
        job = {"avx512": avx512, "runs": [
            {"ranks": ranks, "loads": [
                [str(folder / name), CASES[name].dtype, CASES[name].asked_ranks or ranks] for name in names
            ]} for ranks, names in runs
        ]}  # fmt: skip
        path, result = folder / "job.json", folder / "result.json"
        path.write_text(json.dumps(job))
        done = subprocess.run(
            [PYTHON, root / "tests" / "support" / "vllm_loads.py", path, result], env=worker_environment(1), cwd=folder,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        answer = json.loads(result.read_text())
        assert answer["avx512"] == (cpu_instructions() == "avx512")
        for (_, names), loaded in zip(runs, answer["runs"], strict=True):
            answers.update(zip(names, loaded, strict=True))
    return {name: (configs[name], answers[name]["error"], answers[name]["worst"]) for name in HERE}


def test_vllm_loads_what_the_rules_let_pass_and_nothing_that_they_refuse(seen, version):
    wrong = []
    for name, (config, error, worst) in seen.items():
        works = not error and worst < WRONG
        spoken = said_by_rules(name, config, version)
        print(f"{name}: {'serves' if works else error[:160] or f'computes {worst:.2f} off'}; rules: {spoken}")
        if works == bool(spoken):
            wrong.append((name, error or worst, spoken))
    assert wrong == []


def test_each_case_is_refused_by_the_rules_that_it_names(seen, version):
    wrong = {name: said_by_rules(name, config, version) for name, (config, _, _) in seen.items()}
    assert {name: found for name, found in wrong.items() if found != HERE[name].rules} == {}


def test_every_rule_about_this_vllm_is_seen_at_work(version):
    about = {
        rule.id for rule in rules()
        if rule.covers("vllm", Version(version)) and rule.when.get("device", "cpu") == "cpu"
    }  # fmt: skip
    tried = {rule for one in CASES.values() for rule in one.rules}
    assert about - tried == set(UNSEEN)
    assert tried <= about


def test_the_classes_that_plan_knows_are_those_of_the_registry(version, tmp_path):
    command = [PYTHON, "-c", REGISTRY, tmp_path / "classes.json"]
    done = subprocess.run(command, env=worker_environment(1), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    own, fallback, causal, with_images = json.loads((tmp_path / "classes.json").read_text())
    target = Target("vllm", version, "cpu")
    refused = set()
    for name in {*own, *fallback, *causal}:
        facts = CheckpointFacts("float", architecture=name)
        refused |= {name} if any(found.rule_id == "architecture" for found in verdicts(target, facts)) else set()
        assert (architecture_note(target, name) is not None) == (name in fallback), name
    assert refused == set(causal) - {*own, *fallback}
    assert "RwkvForCausalLM" in refused
    assert {name for name in own if serves_text_alone({"architectures": [name]})} == set(with_images)
