"""Every table of the report: rows of plain values in base units, with what is needed to show them.

The same rows become CSV and JSON files, HTML and Markdown. A value that was not measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quantline.report.evidence import Evidence, Row, first
from quantline.report.words import Column


@dataclass(frozen=True)
class Table:
    """caption: what it says, in a sentence. shown: how many rows a page shows, the first ones; None is all of them."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: list[Row]
    shown: int | None = None

    @property
    def page_rows(self) -> list[Row]:
        """The rows that a page shows."""
        return self.rows if self.shown is None else self.rows[: self.shown]

    @property
    def keys(self) -> list[str]:
        """What the files hold: the columns with the ends of their intervals, then whatever else the rows have."""
        named = [key for column in self.columns for key in (column.key, column.low, column.high) if key]
        return list(dict.fromkeys([*named, *(key for row in self.rows for key in row)]))


def all_tables(evidence: Sequence[Evidence], worst_layers: int) -> dict[str, Table]:
    """Every table by its name, in the order of the report."""
    makers: list[Callable[[Sequence[Evidence]], Table]] = [
        variants, quality, generations, tasks, lambda found: worst(found, worst_layers), layers, restored, speed,
        speed_ratios, servers, memory, alarms, notes, costs, environment, fingerprints, commands, protocol,
    ]  # fmt: skip
    return {table.name: table for table in (make(evidence) for make in makers)}


def _variant(label: str = "variant") -> Column:
    return Column("variant", label, "code")


def variants(evidence: Sequence[Evidence]) -> Table:
    """One row a variant: quality, size, speed, memory; the columns that rules and preferences name."""
    rows = [_variant_row(item) for item in evidence]
    columns = (
        _variant(), Column("bits", "bits", "count", missing="float"), Column("perplexity", "perplexity", "number"),
        Column("difference_percent", "perplexity growth", "growth", "difference_low_percent", "difference_high_percent",
               "baseline"),
        Column("verdict", "against float", missing="baseline"),
        Column("alarms", "alarms", "count", missing="-"), Column("served", "served", "yes"),
        Column("size_bytes", "weights on disk", "bytes"), Column("compression_ratio", "smaller by", "ratio"),
        Column("speed_up", "speed-up", "ratio"), Column("recovery_lowest", "worst task kept", "share"),
    )  # fmt: skip
    return Table("variants", "What each variant costs in quality, and what it gives in size and speed.", columns, rows)


def _variant_row(item: Evidence) -> Row:
    ratios = [row.get("speed_up") for row in item.speed.get("ratios") or []]
    known = [ratio for ratio in ratios if ratio]
    kept = [row for row in item.tasks.get("rows") or [] if row.get("recovery") is not None]
    lowest: Row = min(kept, key=lambda row: row["recovery"], default={})
    slower = item.metric("slower_than_float", "speed")
    gate = item.tasks.get("gate") or {}
    # A gate without a limit, or over no task, passes whatever the variant does.
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
        "speed_up": math.exp(math.fsum(map(math.log, known)) / len(known)) if known else None,
        "slower_than_float": None if slower is None else bool(slower),
        "weights_memory_bytes": item.metric("weights_memory_bytes", "speed", "serve_smoke"),
        "quantize_peak_bytes": item.results.get("quantize", {}).get("peak_memory_bytes"),
        "recovery_lowest": lowest.get("recovery"),
        "recovery_lowest_low": lowest.get("recovery_low"),
        "tasks_passed": bool(gate["passed"]) if judged else None,
        "output_error_max": max((row["output_error"] for row in item.layers if row.get("output_error") is not None),
                                default=None),
        "alarms": None if item.flags is None or item.is_baseline else len(item.flags),
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
        if item.is_baseline:  # compared with itself: zeros that say nothing
            values.update((name, None) for name in names if name.startswith(("nll", "kl", "top1", "noise")))
        gap = values.pop("engine_relative_difference")
        rows.append({"variant": item.name, "verdict": None if item.is_baseline else item.comparison.get("verdict"),
                     **summary, **values, "engine_difference_percent": None if gap is None else 100 * gap})  # fmt: skip
    columns = (
        _variant(),
        Column("verdict", "against float", missing="baseline"),
        Column("difference_percent", "perplexity growth", "growth", "difference_low_percent", "difference_high_percent",
               "baseline"),
        Column("kl_divergence", "KL from float, nats/token", "nats", "kl_divergence_low", "kl_divergence_high"),
        Column("top1_agreement", "same likeliest token", "share", "top1_agreement_low", "top1_agreement_high"),
        Column("engine_difference_percent", "vLLM against reference", "growth"),
    )  # fmt: skip
    return Table("quality", "How far each variant is from the float model, with intervals.", columns, rows)


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
        _variant(), Column("identical_generations", "identical to the end", "share"),
        Column("first_divergence_median", "tokens until they part, median", "number"),
    )  # fmt: skip
    return Table("generations", "Greedy answers to the same prompts, beside the float model's.", columns, rows)


def tasks(evidence: Sequence[Evidence]) -> Table:
    """Tasks with what is kept of the float model's score."""
    rows = [{"variant": item.name, **row} for item in evidence if not item.is_baseline
            for row in item.tasks.get("rows") or []]  # fmt: skip
    columns = (
        _variant(), Column("task", "task"), Column("metric", "metric"), Column("engine", "engine"),
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
    """Every quantized linear of every variant; for the files, not for the page."""
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
    """What putting single linears back into float gives."""
    rows = [{"variant": item.name, **row} for item in evidence for row in item.restored]
    columns: tuple[Column, ...] = (
        _variant(), Column("name", "linear put back to float", "code"), Column("output_error", "its output error", "number"),
        Column("nll_difference_restored", "loss left, nats/token", "nats"),
        Column("recovered_nll", "loss undone, nats/token", "nats", "recovered_low", "recovered_high"),
        Column("recovered_share", "share of the loss undone", "share"),
    )  # fmt: skip
    if any(row.get("recovered_kl_share") is not None for row in rows):
        columns = (*columns, Column("recovered_kl_share", "share of the KL undone", "share"))
    return Table(
        "restored",
        "How much of the loss is undone by putting one linear back into float, one at a time.",
        columns,
        rows,
    )


def speed(evidence: Sequence[Evidence]) -> Table:
    """Throughput and latency by concurrency, float of the same session beside."""
    rows = [
        {"variant": item.name, **row} for item in evidence if not item.is_baseline
        for row in sorted(item.speed.get("rows") or [], key=lambda row: (row["concurrency"], row["model"] != "float"))
    ]  # fmt: skip
    columns = (
        Column("variant", "session of", "code"), Column("model", "model"),
        Column("concurrency", "requests at once", "count"), Column("output_tokens_per_second", "tokens/s", "number"),
        Column("request_throughput", "requests/s", "number"),
        Column("ttft_ms_median", "first token, median", "ms"), Column("ttft_ms_p99", "p99", "ms"),
        Column("itl_ms_median", "between tokens, median", "ms"), Column("itl_ms_p99", "p99", "ms"),
    )  # fmt: skip
    return Table(
        "speed",
        "Throughput and latency by requests at once, the float model of the same session beside.",
        columns,
        rows,
    )


def speed_ratios(evidence: Sequence[Evidence]) -> Table:
    """Speed-up over float by concurrency."""
    rows = [{"variant": item.name, **row} for item in evidence for row in item.speed.get("ratios") or []]
    columns = (
        _variant(), Column("concurrency", "requests at once", "count"),
        Column("speed_up", "times as fast as float", "ratio", "low", "high"),
        Column("slower_than_float", "slower than float", "yes"),
    )  # fmt: skip
    return Table("speed_ratios", "Throughput over that of the float model in the same session.", columns, rows)


def servers(evidence: Sequence[Evidence]) -> Table:
    """Load times and memory of the servers."""
    rows = [{"variant": item.name, **row} for item in evidence for row in item.speed.get("servers") or []]
    columns = (
        Column("variant", "session of", "code"), Column("model", "model"), Column("load_seconds", "load time", "seconds"),
        Column("weights_memory_bytes", "weights in memory", "bytes"), Column("peak_memory_bytes", "peak memory", "bytes"),
    )  # fmt: skip
    return Table("servers", "What it takes to start each server.", columns, rows)


def memory(evidence: Sequence[Evidence]) -> Table:
    """Weights on disk, weights in vLLM's memory, peaks of serving and quantizing."""
    float_memory = next(
        (found for item in evidence if (found := item.metric("float_weights_memory_bytes", "speed"))), None
    )
    rows = []
    for item in evidence:
        of_server = first(item.speed.get("servers") or [], model="variant")
        own = item.metric("weights_memory_bytes", "speed", "serve_smoke")
        rows.append({
            "variant": item.name,
            "size_bytes": item.summary["size_bytes"],
            "compression_ratio": item.summary["compression_ratio"],
            "weights_memory_bytes": float_memory if own is None and item.is_baseline else own,
            "server_peak_bytes": of_server.get("peak_memory_bytes") or item.metric("rss_bytes", "serve_smoke"),
            "quantize_peak_bytes": item.results.get("quantize", {}).get("peak_memory_bytes"),
        })  # fmt: skip
    columns = (
        _variant(), Column("size_bytes", "weights on disk", "bytes"), Column("compression_ratio", "smaller by", "ratio"),
        Column("weights_memory_bytes", "weights in vLLM", "bytes"), Column("server_peak_bytes", "server, peak", "bytes"),
        Column("quantize_peak_bytes", "quantizing, peak", "bytes"),
    )  # fmt: skip
    return Table("memory", "Memory: of the weights, of the server, and of making them.", columns, rows)


def alarms(evidence: Sequence[Evidence]) -> Table:
    """What the evaluation's instruments raised."""
    rows = [{"variant": item.name, **flag} for item in evidence for flag in item.flags or []]
    columns = (
        _variant(), Column("instrument", "instrument"), Column("value", "value", "number"),
        Column("limit", "limit", "number"), Column("message", "what it says"),
    )  # fmt: skip
    return Table("alarms", "Alarms of the evaluation: values beyond their limits.", columns, rows)


def notes(evidence: Sequence[Evidence]) -> Table:
    """What stages refused or warned of."""
    rows = [
        {"variant": item.name, "stage": stage, "kind": kind, "note": " ".join(str(note).split())}
        for item in evidence for stage, result in item.results.items()
        for kind, found in (("refused", [result.get("reason")]), ("note", result.get("warnings") or []))
        for note in found if note
    ]  # fmt: skip
    columns = (_variant(), Column("stage", "stage"), Column("kind", "kind"), Column("note", "what it says"))
    return Table("notes", "What the stages refused, and what they noted.", columns, rows)


def costs(evidence: Sequence[Evidence]) -> Table:
    """Time and peak memory of every stage."""
    rows = [
        {
            "variant": item.name, "stage": stage, "seconds": (result.get("timings") or {}).get("total_seconds"),
            "peak_memory_bytes": result.get("peak_memory_bytes"), **_peaks(result.get("monitor") or {}),
        }
        for item, stage, result in _each_stage(evidence)
    ]  # fmt: skip
    columns = (
        _variant(), Column("stage", "stage"), Column("seconds", "time", "seconds"),
        Column("peak_memory_bytes", "peak of a process", "bytes"),
        Column("peak_rss_bytes", "peak of all processes", "bytes"),
        Column("peak_cpu_percent", "peak CPU", "percent"),
    )  # fmt: skip
    return Table("costs", "Time and memory that each stage took.", columns, rows)


def _peaks(monitor: Row) -> Row:
    return {f"peak_{name}": value for name, value in (monitor.get("peak") or {}).items() if name != "seconds"}


def _each_stage(evidence: Sequence[Evidence]) -> Iterator[tuple[Evidence, str, Row]]:
    # The download is shared by all variants and shown once.
    shared = False
    for item in evidence:
        for stage, result in item.results.items():
            if stage == "download" and shared:
                continue
            shared = shared or stage == "download"
            yield item, stage, result


def environment(evidence: Sequence[Evidence]) -> Table:
    """What each stage ran in."""
    rows = []
    for item, stage, result in _each_stage(evidence):
        found = result.get("environment") or {}
        versions = found.get("versions") or {}
        rows.append({
            "variant": item.name, "stage": stage,
            "toolchain": " / ".join(dict.fromkeys(str(found[key]) for key in ("backend", "toolchain") if found.get(key))),
            "device": found.get("device"), "threads": found.get("threads"),
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "lock_sha256": found.get("lock_sha256"),
        })  # fmt: skip
    columns = (
        _variant(), Column("stage", "stage"), Column("toolchain", "environment"), Column("device", "device"),
        Column("threads", "threads", "count"), Column("versions", "versions"),
        Column("lock_sha256", "lock", "hash", missing="-"),
    )  # fmt: skip
    return Table("environment", "The environment in which each stage ran.", columns, rows)


def fingerprints(evidence: Sequence[Evidence]) -> Table:
    """What each output follows from, and what it holds."""
    rows = [
        {"variant": item.name, "stage": stage, "fingerprint": result.get("fingerprint"),
         "output_hash": result.get("output_hash")}
        for item, stage, result in _each_stage(evidence)
    ]  # fmt: skip
    columns = (
        _variant(), Column("stage", "stage"), Column("fingerprint", "follows from", "hash"),
        Column("output_hash", "holds", "hash"),
    )  # fmt: skip
    return Table("fingerprints", "SHA-256 of what each output follows from, and of what it holds.", columns, rows)


def commands(evidence: Sequence[Evidence]) -> Table:
    """How each variant is made again."""
    rows = [
        {"variant": item.name, "overrides": item.record.overrides,
         "command": f"dvc repro evaluate@{item.name}" if not item.is_baseline else "dvc repro evaluate_baseline"}
        for item in evidence
    ]  # fmt: skip
    columns = (_variant(), Column("overrides", "overrides of conf/", "code"), Column("command", "command", "code"))
    return Table("commands", "The commands that make each variant again.", columns, rows)


def protocol(evidence: Sequence[Evidence]) -> Table:
    """Every option under which quality and speed were measured; from the baseline, and by variant where one differs."""
    values: dict[tuple[str, str], dict[str, str]] = {}
    for item in evidence:
        for section in ("model", "calibration", "evaluate", "serve", "tasks", "speed"):
            skipped = ("process", "smoke") if section == "serve" else ()
            for key, value in _flat(item.record.config.get(section) or {}, skipped):
                values.setdefault((section, key), {})[item.name] = value
    rows = []
    for (section, key), by_variant in values.items():
        groups: dict[str, list[str]] = {}
        for name, value in by_variant.items():
            groups.setdefault(value, []).append(name)
        for value, names in groups.items():
            whose = "all" if len(names) == len(evidence) else ", ".join(names)
            rows.append({"section": section, "option": key, "value": value, "variants": whose})
    columns = (
        Column("section", "section"), Column("option", "option", "code"), Column("value", "value"),
        Column("variants", "of", "text"),
    )  # fmt: skip
    return Table("protocol", "Every option under which quality and speed were measured.", columns, rows)


def _flat(values: Any, skipped: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for key, value in values.items():
            if key not in skipped:
                yield from _flat(value, (), f"{prefix}.{key}" if prefix else str(key))
    else:
        shown = "null" if values is None else str(values).lower() if isinstance(values, bool) else str(values)
        yield prefix, shown
