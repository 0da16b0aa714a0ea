"""Prepares the preflight's inputs from a configuration: the variant, the model's headers, the machine that serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil
import yaml
from pydantic import Field, ValidationError

from quantline.checkpoints.layouts.choice import runtime_of
from quantline.checkpoints.model_files import tokenizer_fault
from quantline.config.context import window_note
from quantline.config.data import DEMO_TEXT, EMBEDDED_MODEL, ModelConfig
from quantline.config.section import Section
from quantline.core.errors import ConfigError, QuantlineError, UserError, naming
from quantline.core.gpu import visible_gpus
from quantline.data import hub
from quantline.data.download import check_beside_weights, label_of, model_name
from quantline.data.headers import fetch_headers
from quantline.pipeline.config import Config, parse
from quantline.pipeline.fit import faults_with_model
from quantline.pipeline.identity import options_fingerprint
from quantline.pipeline.overrides import split, with_variant
from quantline.pipeline.own_files import located, missing_texts
from quantline.pipeline.paths import PIPELINE_HOME, frozen_path, read_result, recorded
from quantline.pipeline.stages import is_baseline
from quantline.pipeline.text_checks import text_checks
from quantline.planning.model_types import why_unknown
from quantline.planning.nearest import nearest
from quantline.planning.preflight import check
from quantline.planning.spec import Finding, Machine, Model, RefusedError, Step, VariantSpec, Work, line
from quantline.quantization.capabilities import calibrated
from quantline.quantization.requirements import requirements_of
from quantline.serving.memory import GIB, Limits
from quantline.serving.rules import Target, cpu_traits, kept_as, process_facts
from quantline.toolchains.environments import detect_platform, expected_version

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


class PlanOptions(Section):
    """Options of `stages.plan` only. compute_capability is written as by NVIDIA, 8.9; null reads it from the local GPU."""

    gpu_memory_gb: float | None = Field(default=None, gt=0)
    critical: bool = False
    context: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    compute_capability: float | None = Field(default=None, gt=0)
    as_json: bool = Field(default=False, alias="json")


def plan_options(arguments: Mapping[str, str | None]) -> PlanOptions:
    """Parse the options of `stages.plan`; None for options that are not given.

    Raises:
        ConfigError: a value is not valid for its option.
    """
    given = {key: _plain(value) for key, value in arguments.items() if value is not None}
    try:
        return PlanOptions.model_validate(given)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise ConfigError([f"{fault['loc'][0]}={fault['input']}: {fault['msg'].lower()}" for fault in faults]) from None


def _plain(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # such as a date that does not exist
        return value


def variant_spec(values: Mapping[str, Any]) -> VariantSpec:
    """The variant that a configuration, given as plain values, describes."""
    needs = requirements_of(values)
    return VariantSpec(
        needs.method, needs.bits, needs.group_size, dict(needs.options), str(values["backend"]),
        tuple(values["layers"]["rules"]), needs.lm_head, needs.low_memory, needs.dtype, str(values["convert"]["target"]),
        str(values["serve"]["dtype"]), int(values["serve"]["process"]["tensor_parallel_size"]), needs.gpus,
    )  # fmt: skip


def machine_of(config: Config, root: Path, options: PlanOptions | None = None) -> Machine:
    """The machine that runs a configuration's variant: the locked or named server, the local CPU or GPU, the given memory.

    With device=auto, giving a GPU's memory or compute capability plans for a GPU, even if this machine has none.
    """
    options = options or PlanOptions()
    device: str = config.device
    if device == "auto":
        device = "cuda" if options.gpu_memory_gb or options.compute_capability else detect_platform()
    known = {
        name: expected_version(root, name, device, python=config.toolchains.get(name)) for name in ("vllm", "llamacpp")
    }
    runtime = runtime_of(config.method.name)
    version, note = known[runtime]
    gpu = next(iter(visible_gpus()), None) if device == "cuda" else None
    capability = gpu.compute_capability if gpu else None
    found = gpu.memory_total_bytes if gpu else None
    if options.compute_capability is not None:
        capability = round(options.compute_capability * 10)
    memory = found if options.gpu_memory_gb is None else round(options.gpu_memory_gb * GIB)
    order = dict(config.backends)
    if config.frozen is not None:
        order[config.method.name] = config.frozen.backends
    return Machine(
        target=Target(
            runtime, version, device, compute_capability=capability,
            kv_cache_dtype=kept_as(config.serve.kv_cache_dtype), **cpu_traits(device),
            **process_facts(config.serve.process),
        ),
        order=order, context=options.context or config.serve.length,
        batch=options.batch or config.serve.process.concurrency, memory_bytes=memory,
        utilization=config.serve.process.gpu_memory_utilization if device == "cuda" else 1.0,
        quantizer_bytes=memory if device == "cuda" else psutil.virtual_memory().total,
        calibration_tokens=config.calibration.n_samples * config.calibration.seq_len, limits=Limits.of(config.serve.process),
        notes=(note,) if note else (), work=_work(config), host_bytes=psutil.virtual_memory().total,
        versions={name: found[0] for name, found in known.items()},
        cache_bytes=round((config.serve.process.kv_cache_gib or 0) * GIB),
    )  # fmt: skip


# Where the options do not limit a text: WikiText-2 has 0.3 million tokens.
_TOKENS_OF_A_TEXT = 300_000


def _work(config: Config) -> Work:
    """What the stages ask of the reference engine."""
    scored = config.evaluate.max_tokens or _TOKENS_OF_A_TEXT
    compared = config.evaluate.divergence.tokens
    measured = config.layer_errors.samples * config.calibration.seq_len if config.layer_errors.enabled else 0
    return Work(
        scored, scored if compared is None else min(compared, scored), config.evaluate.batch_tokens, measured,
        config.evaluate.restore.layers, config.evaluate.restore.tokens,
    )  # fmt: skip


def method_defaults(root: Path) -> dict[str, dict[str, Any]]:
    """The default options of each method, from conf/."""
    defaults = {}
    for path in sorted((root / "conf" / "method").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        defaults[str(values.pop("name"))] = values
    return defaults


def model_of(run: StageRun, *, remote: bool = False) -> Model:
    """The headers of a run's model, from its folder or from the download.

    remote: read those of a model that is not downloaded from the hub.

    Raises:
        UserError: it is not downloaded yet (the message names the command), or download would refuse it: it is not a float
            model, or has no tokenizer that every stage reads alike.
    """
    model = run.config.model
    name = model.name or model_name(model)
    if model.path:
        folder = located(run.root, model.path)
        opened = Model.open(folder, name)
        if fault := tokenizer_fault(folder, model.path):
            raise UserError(f"{model.path}: {fault}")
    else:
        try:
            opened = Model.open(_downloaded(run) / "model", name)
        except UserError as missing:
            if not remote:
                raise
            opened = _on_the_hub(model, name, str(missing))
    named = run.config.toolchains.get("reference")
    transformers, _ = expected_version(run.root, "reference", detect_platform(), python=named)
    if fault := why_unknown(opened.config, transformers):
        raise UserError(f"{label_of(model)}: {fault}")
    return opened


def _on_the_hub(source: ModelConfig, name: str, missing: str) -> Model:
    label = label_of(source)
    with TemporaryDirectory(prefix="quantline-headers-") as folder, naming(Path(folder), label):
        try:
            fetch_headers(source, Path(folder))
        except UserError as error:
            raise UserError(f"{error}\n{missing}") from None
        opened = Model.open(Path(folder), name)
        if fault := tokenizer_fault(Path(folder), "DIR"):
            raise UserError(f"{label}: {fault}")
    return opened


def pinned(source: dict[str, Any]) -> str | None:
    """Set the revision of a model on the hub to its newest commit, for a plan only; returns a note if it did.

    source: the plain values of the section `model`. What is given as a commit, or is no name, stays as it is.

    Raises:
        UserError: the hub does not answer, or has no such repository, branch or tag.
    """
    repo, revision = source.get("repo"), source.get("revision")
    if not isinstance(repo, str) or source.get("path") not in (None, EMBEDDED_MODEL):
        return None
    if not isinstance(revision, str | None) or hub.COMMIT.fullmatch(revision or ""):
        return None
    asked = hub.HubRepo(repo, revision, "model", "model", "give a folder with model.path=DIR")
    source["revision"], _ = hub.described(asked)
    return f"planned at the newest commit; the stages take it with model.revision={source['revision']}"


def refuse_beside_weights(config: Config, root: Path) -> None:
    """Refuse a model in a folder that its download would refuse for what lies beside its weights. Takes a second.

    Raises:
        UserError: a file is not valid JSON, or the tokenizer cannot be used.
    """
    if config.model.path:
        check_beside_weights(config.model, located(root, config.model.path))


def _downloaded(run: StageRun) -> Path:
    """The output of the download of a run's model; the pipeline has one, which may still be of another model."""
    folder = run.input("download")
    made = read_result(folder.with_suffix(".json")).get("options")
    if made != options_fingerprint(run.config, "download", run.root):
        raise UserError(f"{folder.relative_to(run.root)} is not of this model; run `dvc repro download`")
    return folder


def hint(values: Mapping[str, Any], root: Path, options: PlanOptions) -> str | None:
    """The nearest supported variant to one that no configuration allows; None if it cannot be determined."""
    from quantline.pipeline.run import StageRun

    defaults = method_defaults(root)
    usual = {
        "bits": 4,
        "group_size": 128,
        "backend": "auto",
        "dtype": "auto",
        "lm_head": "float",
        "low_memory": False,
        "quantize": {"gpus": 1},
    }
    try:
        method = {"name": "awq", **defaults["awq"]}
        config = parse({**values, **usual, "method": method, "layers": {"rules": []}})
        model, place = model_of(StageRun("plan", config, root, ())), machine_of(config, root, options)
        return nearest(variant_spec(values), model, place, defaults)
    except (QuantlineError, KeyError, TypeError, AttributeError, ValueError):
        return None


def preflight(run: StageRun) -> list[str]:
    """The check before the quantize stage; returns notes, none if the model is missing.

    Raises:
        RefusedError: it cannot be quantized or stored, or (with `convert.for`) cannot be served.
    """
    try:
        model = model_of(run)
    except QuantlineError:
        return []  # the stage itself reports what is missing
    variant, place = variant_spec(run.config.model_dump()), machine_of(run.config, run.root)
    must_serve = run.config.convert.must_serve is not None
    return before_quantize(
        variant, model, place, must_serve=must_serve, defaults=method_defaults(run.root), texts=calibration_findings(run),
        overrides=run.overrides,
    )  # fmt: skip


def refuse_early(config: Config, root: Path) -> None:
    """Refuse a variant of params.yaml by the headers of its model, as `preflight` does; nothing for the float baseline.

    A model that is not on this machine yet is looked at by the stage after its download.

    Raises:
        RefusedError: it cannot be quantized or stored, or (with `convert.for`) cannot be served.
    """
    from quantline.pipeline.run import StageRun

    if not is_baseline(config):
        preflight(StageRun("quantize", config, root, ()))


def length_findings(config: Config, model: Model) -> list[Finding]:
    """What evaluation, calibration and server need and the model does not take."""
    found = [Finding("length", "serve", fault) for fault in faults_with_model(config, model.config)]
    if note := window_note(config.evaluate, model.dimensions.positions):
        found.append(Finding("window", "serve", note, refused=False))
    return found


def text_findings(run: StageRun, *, read: bool) -> list[Finding]:
    """The texts that a variant names and that are not here; read: also what its stages will say of the others."""
    found = [Finding("file", "quantize", fault) for fault in missing_texts(run.root, run.config)]
    if not read:
        return found
    if run.config.model.path:
        return [*found, *text_checks(run.config, run.root, located(run.root, run.config.model.path))]
    try:
        return [*found, *text_checks(run.config, run.root, _downloaded(run) / "model")]
    except UserError:  # its tokenizer is not here
        return found


def calibration_findings(run: StageRun) -> list[Finding]:
    """The demo's own text for another model: refused where the method calibrates on it, unless it is asked for by name."""
    config = run.config
    if config.calibration.name != DEMO_TEXT or config.model.path == EMBEDDED_MODEL or is_baseline(config):
        return []
    asked = [*run.overrides, *(split(config.frozen.overrides, "overrides") if config.frozen else ())]
    if f"calibration={DEMO_TEXT}" in asked:
        return []
    on_it = calibrated(config.method.name, config.method.model_dump())
    reason = (
        f"calibration={DEMO_TEXT} is the demo model's text, and text of another kind costs other models more than "
        + ("the choice of the method" if on_it else "it seems, also where only errors are measured on it")
    )
    remedy = (
        "take calibration=auto (your text with calibration.path=FILE, else C4, else text that the model writes), or ask for "
        f"it by name with calibration={DEMO_TEXT}"
    )
    return [Finding("calibration", "quantize", reason, remedy, source="docs/decisions/0021", refused=on_it)]


def measured_losses(root: Path, config: Config) -> dict[tuple[str, int, int], str]:
    """The measured perplexity of this model's variants, as text, by method, bits and group size."""
    wanted, found = config.model.model_dump(exclude={"name"}), {}
    for path in recorded(root, "evaluate"):
        name = path.parent.name
        try:
            if path.is_relative_to(root / PIPELINE_HOME):
                name = path.parent.relative_to(root / PIPELINE_HOME).as_posix()
                values = yaml.safe_load(frozen_path(root, name).read_text(encoding="utf-8"))
            else:
                values = yaml.safe_load((path.parent / "config.json").read_text(encoding="utf-8"))["config"]
            model = {key: value for key, value in values["model"].items() if key != "name"}
            ratio = float(read_result(path)["metrics"]["perplexity_ratio"])
            key = (str(values["method"]["name"]), int(values["bits"]), int(values["group_size"]))
        except (OSError, QuantlineError, KeyError, TypeError, ValueError):
            continue
        if model == wanted:
            found[key] = f"measured here: perplexity {100 * (ratio - 1):+.2f} % ({name})"
    return found


def before_quantize(
    variant: VariantSpec, model: Model, place: Machine, *, must_serve: bool, defaults: Mapping[str, Mapping[str, Any]],
    texts: Sequence[Finding] = (), overrides: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """The check before the quantize stage computes; returns notes.

    must_serve: refuse a checkpoint that the target cannot load (`convert.for`), instead of only noting it. defaults: the
    options of each method, for the nearest supported variant. texts: what is known of the calibration text. overrides: as
    they are typed.

    Raises:
        UserError: it cannot be quantized, stored or (with must_serve) served; with every reason and the nearest variant.
    """
    plan = check(variant, model, place)
    steps: tuple[Step, ...] = ("quantize", "convert", "serve") if must_serve else ("quantize", "convert")
    against = [*(finding for finding in plan.refused if finding.step in steps), *(one for one in texts if one.refused)]
    if against:
        near = nearest(variant, model, place, defaults)
        raise RefusedError(against, near and with_variant(overrides, near))
    return [*place.notes, *(line(finding) for finding in (*plan.findings, *texts))]
