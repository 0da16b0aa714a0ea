"""Every table of the report. The tables of quality are here, the others in `run_tables`.

The same rows become CSV and JSON files, HTML and Markdown. A value that was not measured is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantline.evaluation.bootstrap import caution
from quantline.evaluation.nats import growth
from quantline.pipeline.figures import mean_ratio
from quantline.report import choice, run_tables
from quantline.report.evidence import Evidence, Row
from quantline.report.table import Table, variant_column
from quantline.report.units import Column


def all_tables(evidence: Sequence[Evidence], worst_layers: int) -> dict[str, Table]:
    """Every table by its name, in the order of the report."""
    makers: list[Callable[[Sequence[Evidence]], Table]] = [
        variants, quality, groups, generations, tasks, lambda found: worst(found, worst_layers), layers, restored,
        choice.searches, choice.measured, choice.untried, choice.losses,
        run_tables.speed, run_tables.speed_ratios, run_tables.servers, run_tables.memory, run_tables.serving,
        alarms, notes,
        run_tables.costs, run_tables.environment, run_tables.fingerprints, run_tables.commands, run_tables.protocol,
    ]  # fmt: skip
    made = (make(evidence) for make in makers)
    return {table.name: table for table in made if table.rows or not table.optional}


def variants(evidence: Sequence[Evidence]) -> Table:
    """One row per variant: quality, size, speed, memory; rules and preferences refer to these columns."""
    rows = [_variant_row(item) for item in evidence]
    columns = (
        variant_column(), Column("bits", "bits", "plain", missing="float"), Column("perplexity", "perplexity", "number"),
        Column("difference_percent", "perplexity growth", "growth", "difference_low_percent", "difference_high_percent"),
        Column("verdict", "against float"),
        Column("alarms", "alarms", "count", missing="-"), Column("served", "served", "yes"),
        Column("size_bytes", "weights on disk", "bytes"), Column("compression_ratio", "smaller by", "ratio"),
        Column("speed_up", "speed-up", "ratio", "speed_up_low", "speed_up_high"),
        Column("recovery_lowest", "worst task kept", "share"),
    )  # fmt: skip
    return Table("variants", "Quality, size and speed of each variant.", columns, rows, main=True)


def _variant_row(item: Evidence) -> Row:
    ratios = [row for row in item.speed.get("ratios") or [] if row.get("speed_up")]
    kept = [row for row in item.tasks.get("rows") or [] if row.get("recovery") is not None]
    lowest: Row = min(kept, key=lambda row: row["recovery"], default={})
    slower = item.metric("slower_than_float", "speed")
    gate = item.tasks.get("gate") or {}
    # A gate without a limit or without tasks always passes, so it says nothing about the variant.
    judged = bool(kept) and gate.get("limit") is not None and gate.get("passed") is not None
    summary = {key: value for key, value in item.summary.items() if key != "reasons"}
    reasons = item.summary["reasons"]
    refusal = reasons.get("serve_smoke") or next(iter(reasons.values()), None)
    return {
        **summary,
        "refusal": refusal and " ".join(str(refusal).split()),
        "verdict": None if item.is_baseline else item.comparison.get("verdict"),
        "kl_divergence": item.metric("kl_divergence", "evaluate"),
        "kl_divergence_high": item.metric("kl_divergence_high", "evaluate"),
        "top1_agreement": item.metric("top1_agreement", "evaluate"),
        "top1_agreement_low": item.metric("top1_agreement_low", "evaluate"),
        "identical_generations": item.metric("identical_generations", "evaluate"),
        "speed_up": mean_ratio(row["speed_up"] for row in ratios),
        "speed_up_low": mean_ratio(row["low"] for row in ratios),
        "speed_up_high": mean_ratio(row["high"] for row in ratios),
        "slower_than_float": None if slower is None else bool(slower),
        "weights_memory_bytes": item.metric("weights_memory_bytes", "speed", "serve_smoke"),
        "quantize_peak_bytes": item.results.get("quantize", {}).get("peak_memory_bytes"),
        "recovery_lowest": lowest.get("recovery"),
        "recovery_lowest_low": lowest.get("recovery_low"),
        "tasks_passed": bool(gate["passed"]) if judged else None,
        "output_error_max": max((row["output_error"] for row in item.layers if row.get("output_error") is not None),
                                default=None),
        "alarms": None if item.flags is None or item.is_baseline else len(item.flags),
        "documents": item.metric("documents", "evaluate"),
    }  # fmt: skip


def quality(evidence: Sequence[Evidence]) -> Table:
    """Distances from the float model, with intervals."""
    rows = []
    for item in evidence:
        found = item.metrics("evaluate")
        names = ("reference_perplexity", "vllm_perplexity", "nll_difference", "nll_difference_low", "nll_difference_high",
                 "kl_divergence", "kl_divergence_low", "kl_divergence_high", "top1_agreement", "top1_agreement_low",
                 "top1_agreement_high", "engine_relative_difference", "noise_low", "noise_high", "noise_runs",
                 "tokens_scored", "documents")  # fmt: skip
        summary = {key: item.summary[key] for key in item.summary if key.startswith("difference_")}
        values = {name: found.get(name) for name in names}
        if item.is_baseline:  # compared with itself, always zero
            values.update((name, None) for name in names if name.startswith(("nll", "kl", "top1", "noise")))
        gap = values.pop("engine_relative_difference")
        values["worst_group"] = next((row["group"] for row in item.groups), None)
        values.update({f"worst_{key}": value for key, value in _percents(found, "worst_group_").items()})
        rows.append({"variant": item.name, "baseline": item.is_baseline,
                     "verdict": None if item.is_baseline else item.comparison.get("verdict"),
                     **summary, **values, "engine_difference_percent": None if gap is None else 100 * gap})  # fmt: skip
    columns = (
        variant_column(),
        Column("verdict", "against float"),
        Column("difference_percent", "perplexity growth", "growth", "difference_low_percent", "difference_high_percent"),
        *_worst_columns(rows),
        Column("kl_divergence", "KL from float, nats/token", "nats", "kl_divergence_low", "kl_divergence_high"),
        Column("top1_agreement", "same likeliest token", "share", "top1_agreement_low", "top1_agreement_high"),
        Column("engine_difference_percent", "vLLM against reference", "growth"),
    )  # fmt: skip
    few = caution(min((row["documents"] for row in rows if row["documents"] is not None), default=None))
    caption = "How far each variant is from the float model, with intervals." + (f" Caution: {few}." if few else "")
    return Table("quality", caption, columns, rows, main=True)


def _worst_columns(rows: Sequence[Row]) -> list[Column]:
    """The worst group's growth and name, where a text has groups."""
    if not any(row.get("worst_group") for row in rows):
        return []
    grown = Column("worst_difference_percent", "worst group", "growth", "worst_low_percent", "worst_high_percent")
    return [grown, Column("worst_group", "which", missing="-")]


def groups(evidence: Sequence[Evidence]) -> Table:
    """The loss of each group of documents, the worst one of each variant first."""
    rows = [{"variant": item.name, **row, **_percents(row, "nll_")} for item in evidence for row in item.groups]
    columns = (
        variant_column(), Column("group", "group"), Column("documents", "documents", "count"),
        Column("difference_percent", "perplexity growth", "growth", "low_percent", "high_percent"),
    )  # fmt: skip
    caption = (
        "The loss by group of documents, the worst first; the intervals hold for all groups of a variant together."
    )
    return Table("groups", caption, columns, rows, optional=True)


def _percents(row: Row, prefix: str) -> Row:
    """The growth of the perplexity in per cent, with its interval, from nats: `difference_percent` and the ends."""
    lost = {end: row.get(f"{prefix}{end}") for end in ("difference", "low", "high")}
    return {f"{end}_percent": None if value is None else 100 * growth(value) for end, value in lost.items()}


def generations(evidence: Sequence[Evidence]) -> Table:
    """Greedy generations beside the float model's."""
    rows = [
        {
            "variant": item.name,
            "identical_generations": item.metric("identical_generations", "evaluate"),
            "first_divergence_median": item.metric("first_divergence_median", "evaluate"),
        }
        for item in evidence
        if not item.is_baseline
    ]
    columns = (
        variant_column(), Column("identical_generations", "identical to the end", "share"),
        Column("first_divergence_median", "tokens until the first difference, median", "plain"),
    )  # fmt: skip
    return Table("generations", "Greedy answers to the same prompts, beside the float model's.", columns, rows)


def tasks(evidence: Sequence[Evidence]) -> Table:
    """Tasks with the kept share of the float model's score."""
    rows = [{"variant": item.name, **row} for item in evidence if not item.is_baseline
            for row in item.tasks.get("rows") or []]  # fmt: skip
    columns = (
        variant_column(), Column("task", "task"), Column("metric", "metric"), Column("engine", "engine"),
        Column("value", "score", "number"), Column("float_value", "float's score", "number"),
        Column("recovery", "kept", "share", "recovery_low", "recovery_high"), Column("n", "items", "count"),
    )  # fmt: skip
    return Table("tasks", "Scores on tasks, and the share of the float model's score that is kept.", columns, rows)


_LAYER_COLUMNS = (
    Column("variant", "variant", "code"), Column("name", "linear", "code"),
    Column("output_error", "output error", "nats"), Column("weight_error", "weight error", "nats"),
    Column("weight_error_max", "largest", "nats"), Column("weight_error_mean", "mean", "nats"),
    Column("level", "level"), Column("bits", "bits", "count"),
)  # fmt: skip


def layers(evidence: Sequence[Evidence]) -> Table:
    """Every quantized linear of every variant; only for the files, not for the page."""
    rows = [{"variant": item.name, **row} for item in evidence for row in item.layers]
    return Table("layers", "The errors of every linear.", _LAYER_COLUMNS, rows, shown=0)


def worst(evidence: Sequence[Evidence], count: int) -> Table:
    """The linears of each variant with the largest output errors."""
    rows = [
        {"variant": item.name, **row} for item in evidence
        for row in sorted(item.layers, key=lambda row: -(row.get("output_error") or 0.0))[:count]
    ]  # fmt: skip
    return Table(
        "worst_layers", f"The {count} linears of each variant with the largest output errors.", _LAYER_COLUMNS, rows
    )


def restored(evidence: Sequence[Evidence]) -> Table:
    """The effect of putting single linears back to float."""
    rows = [_restored_row(item, row) for item in evidence for row in item.restored]
    columns: tuple[Column, ...] = (
        variant_column(), Column("name", "linear put back to float", "code"),
        Column("output_error", "its output error", "nats"),
        Column("nll_difference_restored", "loss left, nats/token", "nats"),
        Column("recovered_nll", "loss undone, nats/token", "nats", "recovered_low", "recovered_high"),
        Column("recovered_share", "share of the loss undone", "share", missing="not told from 0"),
    )  # fmt: skip
    if any(row.get("recovered_kl_share") is not None for row in rows):
        columns = (*columns, Column("recovered_kl_share", "share of the KL undone", "share"))
    return Table(
        "restored",
        "How much of the loss is undone by putting back one linear at a time to float.",
        columns,
        rows,
    )


def _restored_row(item: Evidence, row: Row) -> Row:
    """A share is only told if the loss and the part that is undone are both told from zero."""
    told = item.summary.get("difference_low_percent"), row.get("recovered_low")
    ends = item.summary.get("difference_high_percent"), row.get("recovered_high")
    unsure = any(
        low is not None and high is not None and low <= 0 <= high for low, high in zip(told, ends, strict=True)
    )
    return {"variant": item.name, **row, "recovered_share": None if unsure else row.get("recovered_share")}


def alarms(evidence: Sequence[Evidence]) -> Table:
    """The alarms of the evaluation."""
    rows = [{"variant": item.name, **flag} for item in evidence for flag in item.flags or []]
    columns = (
        variant_column(), Column("instrument", "instrument"), Column("value", "value", "plain"),
        Column("limit", "limit", "plain"), Column("message", "what it says"),
    )  # fmt: skip
    return Table("alarms", "Alarms of the evaluation: values beyond their limits.", columns, rows, main=True)


def notes(evidence: Sequence[Evidence]) -> Table:
    """Refusals and warnings of the stages."""
    rows = [
        {"variant": item.name, "stage": stage, "kind": kind, "note": " ".join(str(note).split())}
        for item in evidence for stage, result in item.results.items()
        for kind, found in (("refused", [result.get("reason")]), ("note", result.get("warnings") or []))
        for note in found if note
    ]  # fmt: skip
    columns = (variant_column(), Column("stage", "stage"), Column("kind", "kind"), Column("note", "what it says"))
    return Table("notes", "Refusals and notes of the stages.", columns, rows)
