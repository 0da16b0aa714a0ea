"""Check from headers, in well under a second, whether a variant can be quantized, stored, served and held in memory.

The checks use three kinds of facts: what backends can do (`capabilities.yaml`), what layouts hold (`checkpoints.layouts`),
and what the serving runtime loads (`serving/rules.yaml`). No tensor is read and no heavy package is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from quantline.checkpoints.layouts import Storage
from quantline.checkpoints.layouts.choice import own_width, runtime_of, types_note
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.linears import select_linears
from quantline.checkpoints.model_config import ties_head
from quantline.checkpoints.quantization_config import LayerSettings
from quantline.core.errors import UserError
from quantline.core.text import binary_size
from quantline.planning import checkpoint_memory, layouts
from quantline.planning.checkpoint_memory import Weights
from quantline.planning.quantization_memory import Peak, computed_in, quantization_peak
from quantline.planning.spec import FLOAT, Finding, Machine, Model, Plan, VariantSpec
from quantline.quantization import capabilities
from quantline.quantization.capabilities import calibrated
from quantline.quantization.quantize import check_group_size, with_own_types
from quantline.serving import memory
from quantline.serving.checkpoint_facts import facts_of_layers
from quantline.serving.rules import Target, architecture_note, architecture_of, serving_dtype, verdicts


def check(variant: VariantSpec, model: Model, machine: Machine, *, sizes_of_refused: bool = True) -> Plan:
    """All known reasons against a variant, and the memory that it takes.

    If a variant cannot be quantized, serving is not checked. sizes_of_refused: calculate the memory also of variants that
    the server refuses.
    """
    if width := own_width(variant.method, variant.options):
        variant = replace(variant, bits=width.bits, group_size=width.group_size)
    backend, findings, widths = _quantizable(variant, model, machine)
    if any(finding.refused for finding in findings):
        return Plan(variant, backend, "", tuple(findings))
    symmetric = layouts.is_symmetric(variant.method, variant.options)
    source = layouts.written(backend, variant.method, variant.options, widths, symmetric=symmetric)
    reordered = _reordered(variant, widths)
    layout = layouts.converted(source, variant.convert, symmetric=symmetric, widths=widths, reordered=reordered)
    findings += _storable(variant, model, widths, source, layout)
    if any(finding.refused for finding in findings):
        return Plan(variant, backend, layout, tuple(findings))
    settings = {name: LayerSettings(width.bits, width.group_size, symmetric) for name, width in widths.items()}
    described = None
    if variant.method != FLOAT:
        described = layouts.described(layout, variant, widths, [name for name in model.shapes if name not in widths])
    architecture = architecture_of(model.config)
    target = _target(variant, machine, architecture)
    for facts in facts_of_layers(
        described,
        settings,
        model.shapes,
        heads=model.dimensions.heads,
        tensor_parallel_size=variant.tensor_parallel_size,
    ):
        for known in verdicts(target, replace(facts, architecture=architecture)):
            findings.append(Finding(known.rule_id, "serve", known.reason, known.remedy, known.source))
    if note := architecture_note(target, architecture):
        findings.append(Finding("architecture", "serve", note, refused=False))
    findings = list(dict.fromkeys(findings))
    if not sizes_of_refused and any(finding.refused for finding in findings):
        return Plan(variant, backend, layout, tuple(findings))
    stored = with_own_types(variant.method, variant.options, model.checkpoint, model.config, widths)[1]
    weights = checkpoint_memory.weights_of(
        model.checkpoint, model.config, stored, layout,
        Storage(zero_points=not symmetric, double_quant=bool(variant.options.get("double_quant", True))),
    )  # fmt: skip
    kv = memory.kv_cache(model.config, machine.target.kv_cache_dtype or "auto")
    plan = Plan(
        variant, backend, layout, tuple(findings), weights, kv,
        None if kv is None else kv.bytes(*machine.limits.cached(machine.context, machine.batch)),
        _overhead(model, machine), _peak(variant, backend, model, machine, weights),
        kv_heads=model.dimensions.kv_heads or 1, offloaded_bytes=_offloaded(variant, model, machine, weights),
    )  # fmt: skip
    return replace(plan, findings=(*findings, *_too_large(plan, machine)))


def _reordered(variant: VariantSpec, widths: Mapping[str, LinearSpec]) -> bool:
    """Whether the checkpoint's config will say that groups are reordered by activation."""
    return bool(variant.options.get("desc_act")) and any(width.group_size != -1 for width in widths.values())


def _target(variant: VariantSpec, machine: Machine, architecture: str | None) -> Target:
    dtype = serving_dtype(variant.serve_dtype, quantized=variant.method != FLOAT, architecture=architecture)
    runtime = runtime_of(variant.method)
    own = machine.target
    if runtime != own.runtime:
        own = replace(own, runtime=runtime, version=machine.versions.get(runtime, own.version))
    return replace(own, dtype=dtype, tensor_parallel_size=variant.tensor_parallel_size)


def _quantizable(
    variant: VariantSpec, model: Model, machine: Machine
) -> tuple[str, list[Finding], dict[str, LinearSpec]]:
    if variant.method == FLOAT:
        return "none", [], {}
    order, findings = list(machine.order.get(variant.method, ())), []
    backend = ""
    try:
        backend, notes = capabilities.choose(variant.backend, order, variant.requirements, model.config)
        findings += [Finding("backend", "quantize", note, refused=False) for note in notes]
    except UserError as error:
        findings.append(Finding("backend", "quantize", str(error), source="capabilities.yaml"))
    try:
        widths = select_linears(
            model.checkpoint, model.config, bits=variant.bits, group_size=variant.group_size, rules=variant.rules,
            lm_head=variant.lm_head,
        )  # fmt: skip
    except UserError as error:
        return backend, [*findings, Finding("layers", "quantize", str(error))], {}
    if model.inventory.note:
        findings.append(Finding("carried-over", "quantize", model.inventory.note, refused=False))
    if variant.method != "bnb" and own_width(variant.method, variant.options) is None:
        try:
            check_group_size(model.shapes, widths)
        except UserError as error:
            findings.append(Finding("group-size", "quantize", str(error)))
    widths, _ = with_own_types(variant.method, variant.options, model.checkpoint, model.config, widths)
    if note := types_note(variant.method, variant.options, widths, model.shapes):
        findings.append(Finding("types", "quantize", note, refused=False))
    return backend, findings, widths


def _storable(
    variant: VariantSpec, model: Model, widths: Mapping[str, LinearSpec], source: str, layout: str
) -> Iterator[Finding]:
    if variant.method == FLOAT:
        return
    for fault in layouts.faults(source, model.shapes, widths):
        yield Finding("layout", "quantize", f"{source}: {fault}", "leave these layers float, or use another method")
    if layout == source:
        return
    for fault in [*layouts.faults(layout, model.shapes, widths), *layouts.conversion_faults(source, layout, widths)]:
        yield Finding("layout", "convert", f"{layout}: {fault}", "set convert.target=auto")


def _overhead(model: Model, machine: Machine) -> int | None:
    context = checkpoint_memory.GPU_CONTEXT if machine.target.device == "cuda" or machine.memory_bytes else 0
    large = machine.memory_bytes is not None and machine.memory_bytes >= memory.LARGE_GPU
    usual = memory.BATCHED_TOKENS_LARGE if large else memory.BATCHED_TOKENS
    _, batch = machine.limits.cached(machine.context, machine.batch)
    computed = memory.activations(model.config, batch, machine.limits.batched_tokens or usual)
    return None if computed is None else context + computed


def _offloaded(variant: VariantSpec, model: Model, machine: Machine, weights: Weights) -> int:
    """Bytes of each GPU's weights that stay in main memory; vLLM moves decoder layers, no embeddings or output layer."""
    if machine.target.device == "cpu":
        return 0
    numbers = model.dimensions
    tables = 1 if ties_head(model.config) else 2
    outside = tables * 2 * (numbers.vocabulary or 0) * (numbers.hidden or 0)
    return min(machine.limits.offloaded, max(weights.total - outside, 0) // variant.tensor_parallel_size)


def _peak(variant: VariantSpec, backend: str, model: Model, machine: Machine, weights: Weights) -> Peak | None:
    if variant.method == FLOAT:
        return None
    tokens = machine.calibration_tokens if calibrated(variant.method, variant.options) else 0
    return quantization_peak(
        model.checkpoint, model.config, method=variant.method, backend=backend,
        dtype=computed_in(variant.dtype, machine.target.device), tokens=tokens, low_memory=variant.low_memory,
        output=weights.total,
    )  # fmt: skip


def _too_large(plan: Plan, machine: Machine) -> Iterator[Finding]:
    needed, given = plan.serving_bytes(), machine.memory_bytes
    if needed is None:
        reason = "config.json does not say how many layers and heads the model has, so the server's memory is unknown"
        yield Finding("memory-unknown", "memory", reason, refused=False)
    elif given is not None and needed > given:
        needs, has = binary_size(needed), binary_size(given)
        reason = f"it needs {needs} with {machine.batch} x {machine.context} tokens, but only {has} is available"
        yield Finding("memory", "memory", reason, "use fewer bits, a shorter context, a smaller batch or more GPUs")
    elif given is not None and needed > given * machine.utilization:
        share_bytes = int(given * machine.utilization)
        reason = f"the server gets {binary_size(share_bytes)} of {binary_size(given)}, but needs {binary_size(needed)}"
        share = min(1.0, -(-100 * needed // given) / 100)
        remedy = f"set serve.process.gpu_memory_utilization={share:.2f} and serve.process.kv_cache_gib=null"
        yield Finding("memory-share", "memory", reason, remedy, refused=False)
    if plan.peak is not None and machine.quantizer_bytes is not None and plan.peak.total > machine.quantizer_bytes:
        peak, free = binary_size(plan.peak.total), binary_size(machine.quantizer_bytes)
        reason = f"quantizing may take {peak}, but only {free} is available"
        remedy = "set low_memory=true or dtype=float16, or use fewer or shorter calibration samples"
        if plan.backend == "native":  # holds neither the model nor samples
            remedy = "quantize on a machine that has it"
        yield Finding("quantization-memory", "quantize", reason, remedy, refused=False)
