"""The output of `python -m stages.plan`: tables for people, and the same as plain values for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import tabulate

from quantline.core.text import binary_size
from quantline.planning.recommend import Choice, Suggestion
from quantline.planning.spec import FLOAT, Finding, Machine, Model, Plan
from quantline.planning.stage_memory import stage_needs
from quantline.quantization import capabilities
from quantline.serving.memory import GIB


def as_json(
    plan: Plan, model: Model, machine: Machine, nearest: str | None, recommendation: Suggestion | None
) -> dict[str, Any]:
    """The whole report as plain values; sizes in bytes."""
    target = machine.target
    return {
        "model": model.name,
        "target": {**asdict(target), "tensor_parallel_size": plan.planned.tensor_parallel_size},
        "memory_bytes": machine.memory_bytes, "context": machine.context, "batch": machine.batch,
        "variant": _variant(plan), "verdict": "ok" if plan.passes() else "refused", "nearest": nearest,
        "findings": [_finding(finding) for finding in plan.findings], "sizes": sizes(plan, machine),
        "stages": [asdict(need) for need in stage_needs(plan, model, machine)],
        "recommendation": _recommendation(recommendation, machine),
    }  # fmt: skip


def sizes(plan: Plan, machine: Machine) -> dict[str, Any] | None:
    """The memory that a variant takes, in bytes; None if it cannot be stored. Values are None if unknown."""
    weights, kv = plan.weights, plan.kv
    if weights is None:
        return None
    needed = plan.serving_bytes()
    return {
        "float_weights": weights.float_source, "weights": weights.total, "codes": weights.packed.codes,
        "scales": weights.packed.scales, "zeros": weights.packed.zeros, "other": weights.packed.other,
        "left_float": weights.left_float, "bits_per_quantized_weight": round(weights.bits_per_quantized_weight, 4),
        "bits_per_weight": round(weights.bits_per_weight, 4), "kv_cache_per_token": kv.bytes_per_token if kv else None,
        "kv_cache_window_per_token": kv.window_bytes_per_token if kv else None,
        "kv_cache_window": kv.window if kv else None, "kv_cache": plan.kv_bytes,
        "activations_and_context": plan.overhead_bytes, "needed_per_device": needed,
        "offloaded_weights_per_device": plan.offloaded_bytes, "main_memory": main_memory(plan, machine),
        "fits": None if machine.memory_bytes is None or needed is None else needed <= machine.memory_bytes,
        "quantization_peak": None if plan.peak is None else {**asdict(plan.peak), "total": plan.peak.total},
    }  # fmt: skip


def main_memory(plan: Plan, machine: Machine) -> int:
    """Bytes of main memory for what GPUs leave there: weights of each of them, and blocks of the cache."""
    return plan.offloaded_bytes * plan.planned.tensor_parallel_size + machine.limits.kv_offloaded


def as_text(plan: Plan, model: Model, machine: Machine, nearest: str | None, recommendation: Suggestion | None) -> str:
    """The whole report as text."""
    variant, target = plan.planned, machine.target
    name = variant.method if variant.method == FLOAT else f"{variant.method} {variant.bits} bits, {_groups(plan)}"
    if kind := variant.options.get("type"):  # which says more than bits and groups
        name = f"{variant.method} {kind}"
    traits = [f"{target.runtime} {target.version} on {target.device}"]
    traits += [target.instructions] if target.instructions else []
    traits += [f"compute capability {target.compute_capability / 10}"] if target.compute_capability else []
    traits += [f"{variant.tensor_parallel_size} GPUs"] if variant.tensor_parallel_size > 1 else []
    lines = [
        f"model   {model.name}",
        f"variant {name}" + (f", by {plan.backend}" if plan.backend not in ("", "none") else ""),
    ]
    lines[-1] += f", on {variant.quantize_gpus} GPUs" if variant.quantize_gpus > 1 else ""
    lines += [f"stored  {plan.layout}"] if plan.layout else []
    lines += [f"target  {', '.join(traits)}", ""]
    lines += [_finding_lines(finding) for finding in plan.findings] or ["ok: no known reason against it"]
    if plan.findings and plan.passes():
        lines.append("ok: none of these notes is a reason against it")
    if plan.refused and plan.passes("quantize", "convert", "memory"):
        lines.append(
            "only serving is refused: the stages quantize and evaluate it all the same (unless convert.for=vllm)"
        )
    if nearest:
        lines.append(f"the nearest that works: {nearest}")
    if plan.weights is not None:
        lines += ["", _sizes_table(plan, machine), "", _stages_table(plan, model, machine)]
    if recommendation is not None:
        lines += ["", *_recommended(recommendation, machine)]
    return "\n".join(lines)


def _groups(plan: Plan) -> str:
    size = plan.planned.group_size
    if capabilities.groupless(plan.backend, plan.planned.method, plan.planned.bits):
        return "one scale a row"
    return "one group a channel" if size == -1 else f"groups of {size}"


def _finding_lines(finding: Finding) -> str:
    parts = [f"{'REFUSED' if finding.refused else 'note'} ({finding.id}): {finding.reason}"]
    parts += [f"    do: {finding.remedy}"] if finding.remedy else []
    parts += [f"    source: {finding.source}"] if finding.source else []
    return "\n".join(parts)


def _sizes_table(plan: Plan, machine: Machine) -> str:
    weights, kv = plan.weights, plan.kv
    assert weights is not None
    packed = weights.packed
    cache = "config.json does not say how many layers and heads keep keys and values"
    if kv is not None:
        window = f", {binary_size(kv.window_bytes_per_token)} a token of the last {kv.window}" if kv.window else ""
        context, batch = machine.limits.cached(machine.context, machine.batch)
        cache = f"{batch} x {context} tokens, {binary_size(kv.bytes_per_token)} a token{window}"
    rows = [
        ("float weights", binary_size(weights.float_source), "as downloaded"),
        ("weights", binary_size(weights.total), f"{weights.bits_per_weight:.2f} bits a weight over the whole model"),
    ]
    if packed.total:
        share = f"{weights.bits_per_quantized_weight:.2f} bits a weight"
        rows += [
            ("  quantized", binary_size(packed.total),
             f"{share}: codes {binary_size(packed.codes)}, scales {binary_size(packed.scales)}, "
             f"zero points {binary_size(packed.zeros)}, other {binary_size(packed.other)}"),
            ("  left float", binary_size(weights.left_float), "embeddings, norms, biases, linears that are not quantized"),
        ]  # fmt: skip
    rows += [
        ("KV cache", _size(plan.kv_bytes), cache),
        ("activations", _size(plan.overhead_bytes), "with the GPU's context; assumed (src/quantline/serving/memory.py)"),
        ("needed", _size(plan.serving_bytes()), _fit(plan, machine)),
    ]  # fmt: skip
    if kept := main_memory(plan, machine):
        own = f"{binary_size(plan.offloaded_bytes)} of each GPU's weights"
        rows.insert(
            -1, ("main memory", binary_size(kept), f"{own}, {binary_size(machine.limits.kv_offloaded)} for the cache")
        )
    if plan.peak is not None:
        rows.append(("quantizing", binary_size(plan.peak.total), f"estimated peak: {plan.peak.formula}"))
    return str(tabulate.tabulate(rows, tablefmt="plain", disable_numparse=True, preserve_whitespace=True))


def _stages_table(plan: Plan, model: Model, machine: Machine) -> str:
    """A row for each stage: memory of its largest process on the host, memory on the GPU, disk."""
    device = machine.target.device == "cuda"
    rows = [
        (need.stage, binary_size(need.host), *([binary_size(need.device) if need.device else "-"] if device else []),
         binary_size(need.disk) if need.disk else "-", need.formula)
        for need in stage_needs(plan, model, machine)
    ]  # fmt: skip
    headers = ("stage", "host memory", *(["GPU memory"] if device else []), "disk", "of which the most is")
    return str(tabulate.tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))


def _size(number: int | None) -> str:
    return "unknown" if number is None else binary_size(number)


def _fit(plan: Plan, machine: Machine) -> str:
    each = " on each GPU" if plan.planned.tensor_parallel_size > 1 else ""
    needed = plan.serving_bytes()
    if machine.memory_bytes is None or needed is None:
        return f"to serve it{each}"
    fits = needed <= machine.memory_bytes
    return f"{'fits' if fits else 'does NOT fit'} in {machine.memory_bytes / GIB:.3g} GiB{each}"


def _recommended(recommendation: Suggestion, machine: Machine) -> list[str]:
    headers = ["", "variant", "bits/w", "weights", "needed", "serves", "fits", "loss"]
    rows = [_row(choice, recommendation, machine) for choice in recommendation.choices]
    table = tabulate.tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
    best = recommendation.best
    goal = "least loss" if recommendation.critical else "small with little loss"
    if best is None:
        return [str(table), "", "recommended: none of these works on this target"]
    known = best.measured or best.loss
    return [str(table), "", f"recommended, {goal}: {best.overrides}", f"    {best.why}; loss: {known}"]


def _row(choice: Choice, recommendation: Suggestion, machine: Machine) -> list[str]:
    plan = choice.plan
    against = [finding for finding in choice.against if finding.step != "memory"]
    serves = "yes" if not against else f"no ({against[0].id})"
    unknown = plan.weights is None or machine.memory_bytes is None or plan.serving_bytes() is None
    fits = "-" if unknown else "yes" if plan.passes("memory") else "no"
    return [
        "->" if choice is recommendation.best else "",
        choice.overrides.replace("method=", "", 1),
        f"{plan.weights.bits_per_weight:.2f}" if plan.weights else "-",
        binary_size(plan.weights.total) if plan.weights else "-",
        _size(plan.serving_bytes()) if plan.weights else "-",
        serves, fits, choice.measured or choice.loss,
    ]  # fmt: skip


def _recommendation(recommendation: Suggestion | None, machine: Machine) -> dict[str, Any] | None:
    if recommendation is None:
        return None
    best = recommendation.best
    rows = [
        {
            "overrides": choice.overrides, "works": choice.works, "why": choice.why, "loss": choice.loss,
            "measured": choice.measured or None, "findings": [_finding(finding) for finding in choice.plan.findings],
            "sizes": sizes(choice.plan, machine),
        }
        for choice in recommendation.choices
    ]  # fmt: skip
    return {"best": best.overrides if best else None, "critical": recommendation.critical, "choices": rows}


def _variant(plan: Plan) -> Mapping[str, Any]:
    variant = asdict(plan.planned)
    return {**variant, "rules": list(variant["rules"]), "backend": plan.backend, "layout": plan.layout}


def _finding(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "verdict": "refused" if finding.refused else "note"}
