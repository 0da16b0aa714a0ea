"""Tables of speed, memory, costs, environments, commands and the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quantline.pipeline.names import dvc_stage
from quantline.pipeline.server import record_line
from quantline.report.evidence import Evidence, Row, first
from quantline.report.table import Table, variant_column
from quantline.report.units import Column


def speed(evidence: Sequence[Evidence]) -> Table:
    """Throughput and latency by concurrency, with the float model of the same session."""
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
    found = [f"{item.name}: {why}" for item in evidence for why in item.speed_left_out]
    left_out = f"Left out: {'; '.join(found)}." if found else ""
    caption = "Throughput and latency by requests at once, the float model of the same session beside."
    if rows and left_out:
        caption = f"{caption} {left_out}"
    return Table("speed", caption, columns, rows, absent=left_out)


def speed_ratios(evidence: Sequence[Evidence]) -> Table:
    """Speed-up over float by concurrency."""
    rows = [{"variant": item.name, **row} for item in evidence for row in item.speed.get("ratios") or []]
    columns = (
        variant_column(), Column("concurrency", "requests at once", "count"),
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
    return Table("servers", "Load time and memory of each server.", columns, rows)


def library(evidence: Sequence[Evidence]) -> Table:
    """Float model and variant answering questions by their own library, without a server."""
    keys = (
        "model",
        "library",
        "linear",
        "attention",
        "load_seconds",
        "memory_before",
        "memory_after",
        "tokens_per_second",
    )
    rows = [
        {
            "variant": item.name, **{key: row[key] for key in keys},
            "attention": "fused" if row["fuse"] else row["attention"],
            "environment": row["environment"], "device": row["device"], "questions": len(row["answers"]),
        }
        for item in evidence for row in item.speed.get("library") or []
    ]  # fmt: skip
    columns = (
        variant_column(), Column("model", "model"), Column("library", "library"), Column("linear", "linears", "code"),
        Column("attention", "attention", missing="its own"), Column("load_seconds", "loaded in", "seconds"),
        Column("memory_before", "memory before", "bytes"), Column("memory_after", "after", "bytes"),
        Column("tokens_per_second", "tokens/s", "number"),
    )  # fmt: skip
    said = (
        "Questions in a row by each model’s own library, without a server; memory is the GPU’s, on a CPU the process’s."
    )
    return Table("library", said, columns, rows)


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
        variant_column(), Column("size_bytes", "weights on disk", "bytes"),
        Column("compression_ratio", "smaller by", "ratio"),
        Column("weights_memory_bytes", "weights in vLLM", "bytes"), Column("server_peak_bytes", "server, peak", "bytes"),
        Column("quantize_peak_bytes", "quantizing, peak", "bytes"),
    )  # fmt: skip
    said = next(
        (found for item in evidence if (found := (item.speed.get("session") or {}).get("weights_memory_is"))), ""
    )
    note = f" In vLLM: {said}." if said else ""
    return Table("memory", f"Memory of the weights, of the server, and of quantizing.{note}", columns, rows)


def fleet(drill: Row) -> Table:
    """What each fault cost the fleet of these variants. drill: see `quantline.pipeline.fleet_result`."""
    columns = (
        Column("fault", "fault"), Column("requests", "requests", "count"), Column("lost", "lost", "count"),
        Column("broken", "broken after the first byte", "count"), Column("retried", "retried", "count"),
        Column("elsewhere", "answered by another variant", "count"), Column("p50_seconds", "median", "seconds"),
        Column("p99_seconds", "99th percentile", "seconds"),
        Column("back_seconds", "back on the first variant after", "seconds", missing="not in time"),
    )  # fmt: skip
    if "rows" not in drill:
        return Table("fleet", "The fleet was not tried.", columns, [], absent=f"It cannot run here: {drill['reason']}")
    chain, keys = " -> ".join(drill["chain"]), [column.key for column in columns]
    rows = [{**{key: row[key] for key in keys}, "lost": row["lost"] + row["quiet"]} for row in drill["rows"]]
    caption = (
        f"What faults of the first variant cost the precision {drill['precision']}, {chain}, on {drill['device']}."
    )
    return Table("fleet", caption, columns, rows, main=True)


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
        variant_column(), Column("stage", "stage"), Column("seconds", "time", "seconds"),
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
    """The environment of each stage."""
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
        variant_column(), Column("stage", "stage"), Column("toolchain", "environment"), Column("device", "device"),
        Column("threads", "threads", "count"), Column("versions", "versions"),
        Column("lock_sha256", "lock", "hash", missing="-"),
    )  # fmt: skip
    return Table("environment", "The environment in which each stage ran.", columns, rows)


def fingerprints(evidence: Sequence[Evidence]) -> Table:
    """The fingerprint and the content hash of each output."""
    rows = [
        {"variant": item.name, "stage": stage, "fingerprint": result.get("fingerprint"),
         "output_hash": result.get("output_hash")}
        for item, stage, result in _each_stage(evidence)
    ]  # fmt: skip
    columns = (
        variant_column(), Column("stage", "stage"), Column("fingerprint", "follows from", "hash"),
        Column("output_hash", "holds", "hash"),
    )  # fmt: skip
    return Table(
        "fingerprints", "SHA-256 of everything that determines each output, and of its content.", columns, rows
    )


def commands(evidence: Sequence[Evidence]) -> Table:
    """The command that rebuilds each variant."""
    rows = [
        {"variant": item.name, "overrides": item.record.overrides,
         "command": f"dvc repro {' '.join(_last_stages(item))}"}
        for item in evidence
    ]  # fmt: skip
    columns = (
        variant_column(),
        Column("overrides", "overrides of conf/", "code"),
        Column("command", "command", "code"),
    )
    return Table("commands", "The commands that rebuild each variant.", columns, rows)


def serving(evidence: Sequence[Evidence]) -> Table:
    """How to serve each variant that was served: here, and elsewhere in the folder of its files."""
    rows = [
        {"variant": item.name, "here": f"python -m stages.serve variant={item.whole_name}", "elsewhere": line}
        for item in evidence
        if (line := record_line(item.record, "."))
    ]
    columns = (variant_column(), Column("here", "here", "code"), Column("elsewhere", "elsewhere", "code"))
    return Table("serving", "How each variant is served, as it was when it was measured.", columns, rows)


def _last_stages(item: Evidence) -> list[str]:
    """The last stages of a variant, which depend on all others, by their DVC names."""
    last = [stage for stage in ("evaluate", "tasks", "speed") if stage == "evaluate" or stage in item.results]
    return [dvc_stage(stage, item.whole_name) for stage in last]


def protocol(evidence: Sequence[Evidence]) -> Table:
    """Every option of the measurement of quality and speed; one row for all variants, or one per differing value."""
    values: dict[tuple[str, str], dict[str, str]] = {}
    for item in evidence:
        for section in ("model", "calibration", "evaluate", "serve", "tasks", "speed"):
            skipped = ("process", "smoke") if section == "serve" else ()
            for key, value in _flat(item.record.config.get(section) or {}, skipped):
                values.setdefault((section, key), {})[item.name] = value
        # The results of the options: the scored text, and the session of the speed measurement.
        found = {"evaluated": item.comparison.get("protocol"), "speed session": item.speed.get("session")}
        for section, known in found.items():
            for key, value in _flat(known or {}, ()):
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
