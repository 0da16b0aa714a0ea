"""Whether a runtime will load a checkpoint, decided by the rules in `rules.yaml` without starting it."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts import awq, exl3, gptq_config, modelopt
from quantline.checkpoints.layouts.config_values import stored_bits_and_groups
from quantline.checkpoints.layouts.gguf import layout as gguf
from quantline.checkpoints.model_config import read_config
from quantline.checkpoints.quantization_config import described_in, quantization_of
from quantline.config.serve import ProcessConfig
from quantline.core.errors import UserError

# In the name of a tensor of one expert of a mixture.
EXPERT = re.compile(r"\.experts\.\d+\.")
_CPU_INFO = Path("/proc/cpuinfo")
# The flags by which torch recognizes a CPU with AVX-512; vLLM chooses its library by that.
_AVX512 = {"avx512f", "avx512vl", "avx512bw", "avx512dq"}


@dataclass(frozen=True)
class Target:
    """What serves: runtime `vllm` or `llamacpp`, its version, device `cpu` or `cuda`, and the activations' dtype.

    instructions: the best instruction set of an x86 CPU that vLLM has kernels for: `avx512`, `avx2` or `none`.
    amx: whether the CPU has AMX tiles; None if unknown.
    compute_capability: of an NVIDIA GPU, 89 for 8.9. None if unknown; then no rule about it applies.
    cpu_offload_gib, kv_offload_gib, attention_backend: options of the server's process; None where they are not set.
    kv_cache_dtype: of the keys and values that are kept; None where it is that of the activations.
    """

    runtime: str
    version: str
    device: str
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    instructions: str | None = None
    amx: bool | None = None
    compute_capability: int | None = None
    cpu_offload_gib: float | None = None
    kv_offload_gib: float | None = None
    attention_backend: str | None = None
    kv_cache_dtype: str | None = None


PROCESS_FACTS = ("cpu_offload_gib", "kv_offload_gib", "attention_backend")


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint's quantization config says; None for what it does not say.

    method: `awq`, `gptq`, `compressed-tensors`, `bitsandbytes`, `gguf` or `float`. layout: `gemm`, `gemv`, ... for AWQ;
    `gptq` or `gptq_v2` for GPTQ; the mixture for GGUF; the format for compressed-tensors. group_size: -1 is one group per
    channel. The rest comes
    from the layers (see `checkpoint_facts`). widths_divisible_by_32: whether in and out of every quantized layer are,
    on each GPU. fused: `mixed` if the parts of a fused linear differ, else `alike`. head: whether the config names a
    quantized output layer, `named` or `unnamed`; `float` if that layer is not quantized. experts: `quantized`, if
    experts of a mixture are, `float` if none of them is, None without experts. qkv: `one` if q, k and v are one quantized
    linear in the checkpoint, too. cut: what tensor parallelism would cut through: `heads`, `groups` or `nothing`.
    architecture: the class that config.json names, see `architecture_of`.
    strategy: what shares a scale, in the words of compressed-tensors. inputs: what linears' inputs are rounded to, `float`
    (they are not), `int8`, `fp8` or `fp4`; `fixed` where their scales are.
    blocks: with scales of blocks of 128 rows, `cut` if one holds rows of two linears that the runtime fuses, else `whole`.
    """

    method: str
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    zero_point: bool | None = None
    layout: str | None = None
    widths_divisible_by_32: bool | None = None
    fused: str | None = None
    head: str | None = None
    experts: str | None = None
    qkv: str | None = None
    cut: str | None = None
    architecture: str | None = None
    strategy: str | None = None
    inputs: str | None = None
    blocks: str | None = None


@dataclass(frozen=True)
class Rule:
    """One thing that a runtime does not load, or computes wrongly."""

    id: str
    runtime: str
    versions: SpecifierSet
    when: Mapping[str, Any]
    reason: str
    remedy: str
    source: str

    def covers(self, runtime: str, version: Version) -> bool:
        """Whether the rule is about this version of this runtime."""
        return self.runtime == runtime and self.versions.contains(version, prereleases=True)


@dataclass(frozen=True)
class Ruling:
    """supported: no rule is against it. Otherwise rule_id, reason, remedy and source describe the rule that is."""

    supported: bool
    reason: str = ""
    remedy: str = ""
    rule_id: str = ""
    source: str = ""


@cache
def rules() -> tuple[Rule, ...]:
    """The shipped rules, in their order.

    Raises:
        ValueError: a rule of the file uses a fact that does not exist.
    """
    text = resources.files("quantline.serving").joinpath("rules.yaml").read_text(encoding="utf-8")
    return tuple(_parse(entry) for entry in yaml.safe_load(text))


def verdict(target: Target, facts: CheckpointFacts) -> Ruling:
    """Whether `target` will load a checkpoint with these facts, by the first rule that applies.

    Raises:
        UserError: the target's version is not a version number.
    """
    return next(iter(verdicts(target, facts)), Ruling(True))


def verdicts(target: Target, facts: CheckpointFacts) -> list[Ruling]:
    """Every rule against `target` loading a checkpoint with these facts.

    Raises:
        UserError: the target's version is not a version number.
    """
    try:
        version = Version(target.version)
    except InvalidVersion:
        raise UserError(
            f"version {target.version!r} of {target.runtime}: not a version number; give one such as 0.32.0"
        ) from None
    known = _known(target, facts)
    return [
        Ruling(False, rule.reason.format(**known), rule.remedy.format(**known), rule.id, rule.source)
        for rule in rules()
        if rule.covers(target.runtime, version)
        and all(_holds(condition, known[name]) for name, condition in rule.when.items())
    ]


def process_facts(process: ProcessConfig) -> dict[str, Any]:
    """What a target has of the options of the server's process."""
    return {name: getattr(process, name) or None for name in PROCESS_FACTS}


def refuse_options(version: str, device: str, process: ProcessConfig) -> None:
    """Refuse options of the server's process that this vLLM lacks on this device, or takes and ignores.

    They are no part of a variant, so they say nothing about whether it is served.

    Raises:
        UserError: every such option.
    """
    target = Target("vllm", version, device, **process_facts(process))
    if faults := verdicts(target, CheckpointFacts("float")):
        raise UserError("\n  ".join(f"{fault.reason}; {fault.remedy} [{fault.rule_id}]" for fault in faults))


def facts_of(quantization: Mapping[str, Any] | None, *, widths_divisible_by_32: bool | None = None) -> CheckpointFacts:
    """The facts in the `quantization_config` of a config.json; None stands for a float model."""
    if not quantization:
        return CheckpointFacts("float")
    method = str(quantization.get("quant_method", "unknown"))
    if method == modelopt.METHOD:
        return CheckpointFacts(method, layout=modelopt.algorithm_of(quantization).lower())
    if method == "compressed-tensors":
        return _compressed_facts(quantization, widths_divisible_by_32)
    if method == exl3.NAME:
        return CheckpointFacts(method)
    if method == gguf.NAME:
        return CheckpointFacts(method, layout=str(quantization.get("type")).lower())
    layout = awq.version_of(quantization) if method == awq.METHOD else gptq_config.format_of(quantization)
    bits, group_size = stored_bits_and_groups(quantization)
    return CheckpointFacts(
        method=method,
        bits=bits,
        group_size=group_size,
        sym=quantization.get("sym"),
        desc_act=quantization.get("desc_act"),
        zero_point=quantization.get("zero_point"),
        layout=layout.lower(),
        widths_divisible_by_32=widths_divisible_by_32,
    )


def _compressed_facts(quantization: Mapping[str, Any], widths_divisible_by_32: bool | None) -> CheckpointFacts:
    # Each group of linears has its own scheme. The one that fewest runtimes load stands for all: bits other than 4 first.
    groups = quantization.get("config_groups") or {}
    schemes = [group.get("weights") or {} for group in groups.values()]
    bits = sorted((scheme.get("num_bits") for scheme in schemes), key=lambda width: width == 4)
    sizes = {scheme.get("group_size") or -1 for scheme in schemes}
    return CheckpointFacts(
        method="compressed-tensors",
        bits=bits[0] if bits else None,
        group_size=sizes.pop() if len(sizes) == 1 else None,
        sym=all(scheme.get("symmetric", True) for scheme in schemes),
        desc_act=any(scheme.get("actorder") not in (None, False, "static", "weight") for scheme in schemes),
        layout=str(quantization.get("format")),
        widths_divisible_by_32=widths_divisible_by_32,
        strategy=schemes[0].get("strategy") if schemes else None,
        inputs=_inputs([group.get("input_activations") for group in groups.values()]),
    )


def _inputs(sections: Sequence[Mapping[str, Any] | None]) -> str:
    rounded = next((section for section in sections if section), None)
    if rounded is None:
        return "float"
    if not rounded.get("dynamic"):
        return "fixed"
    return f"{'int' if rounded.get('type', 'int') == 'int' else 'fp'}{rounded.get('num_bits', 8)}"


def _known(target: Target, facts: CheckpointFacts) -> dict[str, Any]:
    parity = None
    if facts.group_size is not None and facts.group_size > 0:
        parity = "odd" if facts.group_size % 2 else "even"
    served_as = _served_as(target, facts.architecture)
    return {**asdict(target), **asdict(facts), "group_size_parity": parity, "served_as": served_as}


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The class that a server builds for a model, by its config.json; None if that names none, or has code of its own."""
    named = config.get("architectures")
    if config.get("auto_map") or not isinstance(named, list) or not named:
        return None
    return str(named[0])


def serves_text_alone(config: Mapping[str, Any]) -> bool:
    """Whether a server is to leave out what its class has beside the language model, such as a vision tower.

    Its parts for images need an image processor, which neither the environment nor a checkpoint has, and take memory.
    """
    named = config.get("architectures")
    return isinstance(named, list) and any(str(named[0]) in entry["with_images"] for entry in _architectures() if named)


def architecture_note(target: Target, architecture: str | None) -> str | None:
    """What to say of a class that the target only runs by its fallback; None if there is nothing to say."""
    if _served_as(target, architecture) != "fallback":
        return None
    return (
        f"{target.runtime} {target.version} has no class {architecture} of its own; it would run that of transformers, "
        "which was not tried"
    )


def _served_as(target: Target, architecture: str | None) -> str | None:
    """How a target serves a class: `own`, `fallback` or `none`; None if that is not known."""
    if architecture is None or not target.version:
        return None
    version = Version(target.version)
    for entry in _architectures():
        if target.runtime == entry["runtime"] and SpecifierSet(entry["versions"]).contains(version, prereleases=True):
            return next((kind for kind in ("own", "fallback") if architecture in entry[kind]), "none")
    return None


@cache
def _architectures() -> tuple[dict[str, Any], ...]:
    text = resources.files("quantline.serving").joinpath("architectures.yaml").read_text(encoding="utf-8")
    return tuple(yaml.safe_load(text))


def _holds(condition: Any, value: Any) -> bool:
    if value is None:
        return False
    if isinstance(condition, dict):
        return bool(value < condition["below"]) if "below" in condition else not _holds(condition["not"], value)
    return value in (condition if isinstance(condition, list) else [condition])


def _parse(entry: dict[str, Any]) -> Rule:
    facts = _known(Target("", "", ""), CheckpointFacts(""))
    unknown = set(entry["when"]) - set(facts)
    if unknown:
        raise ValueError(f"serving rule {entry['id']}: there is no fact named {', '.join(sorted(unknown))}")
    # A reason or remedy with an unknown placeholder fails here, not in front of a user.
    entry["reason"].format(**facts), entry["remedy"].format(**facts)
    return Rule(**{**entry, "versions": SpecifierSet(entry["versions"])})


def serving_dtype(dtype: str, *, quantized: bool, architecture: str | None = None) -> str:
    """The activations' dtype for vLLM; `auto` is bfloat16 for float models, else float16, the dtype of the scales.

    architecture: see `architecture_of`; classes that vLLM does not run in float16 get bfloat16.
    """
    if dtype != "auto":
        return dtype
    return "float16" if quantized and architecture not in _not_in_float16() else "bfloat16"


@cache
def _not_in_float16() -> frozenset[str]:
    against = (rule.when["architecture"] for rule in rules() if rule.id.startswith("architecture-float16"))
    return frozenset(name for names in against for name in names)


def checkpoint_facts(checkpoint: Path) -> CheckpointFacts:
    """What decides whether a target loads a checkpoint, from its config and its headers."""
    found, architecture = described_in(checkpoint), architecture_of(read_config(checkpoint))
    if found is None:
        experts = None
        with suppress(UserError):  # damaged or missing weights are what their reader refuses, not a rule
            experts = "float" if any(EXPERT.search(name) for name in Checkpoint.open(checkpoint).names) else None
        return replace(facts_of(None), architecture=architecture, experts=experts)
    quantization_of(checkpoint)  # refuses unknown layouts
    return replace(facts_of(found[1]), architecture=architecture)


def here(runtime: str, version: str, device: str, dtype: str, kv_cache_dtype: str = "auto") -> Target:
    """This machine's server as a target."""
    return Target(runtime, version, device, dtype, kv_cache_dtype=kept_as(kv_cache_dtype), **cpu_traits(device))


def kept_as(kv_cache_dtype: str) -> str | None:
    """The fact about the KV cache that `serve.kv_cache_dtype` gives."""
    return None if kv_cache_dtype == "auto" else kv_cache_dtype


def cpu_traits(device: str) -> dict[str, Any]:
    """What a target on this machine has of `instructions` and `amx`; nothing on a GPU."""
    return {"instructions": cpu_instructions(), "amx": cpu_has_amx()} if device == "cpu" else {}


def _cpu_flags(info: Path) -> set[str]:
    """The flags of an x86 CPU; none for other CPUs."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return set()
    try:
        lines = info.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def cpu_has_amx(info: Path = _CPU_INFO) -> bool:
    """Whether this CPU has AMX tiles."""
    return "amx_tile" in _cpu_flags(info)


def cpu_instructions(info: Path = _CPU_INFO) -> str | None:
    """The best instruction set of this x86 CPU that vLLM has kernels for: avx512, avx2 or none; None for other CPUs."""
    flags = _cpu_flags(info)
    return "avx512" if flags >= _AVX512 else "avx2" if "avx2" in flags else "none" if flags else None
