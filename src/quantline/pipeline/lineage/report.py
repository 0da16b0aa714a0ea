"""A lineage as text: for each stage its fingerprint, inputs, output, environment, time and machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from quantline.evaluation.nats import growth
from quantline.pipeline.lineage.chain import Lineage
from quantline.pipeline.lineage.diff import Difference

_SHORT = 12


def as_text(chain: Lineage) -> str:
    """The lineage, one paragraph per stage, and the verdict at the end."""
    lines = [f"{chain.name} ({chain.origin})"]
    for stage, result in chain.results.items():
        lines += ["", *_stage_lines(stage, result)]
    lines += ["", _verdict(chain)]
    return "\n".join([*lines, *(f"note: {fault}" for fault in chain.broken())])


def difference_text(one: Lineage, other: Lineage, found: Difference | None) -> str:
    """The first difference of two lineages, as text."""
    head = f"{one.name} ({one.origin}) | {other.name} ({other.origin})"
    if found is None:
        same = [stage for stage in one.results if stage in other.results]
        return f"{head}\nno difference in {', '.join(same)}; times and folders are not compared"
    return f"{head}\nfirst difference: {found}"


def _stage_lines(stage: str, result: Mapping[str, Any]) -> list[str]:
    environment, timings = result.get("environment") or {}, result.get("timings") or {}
    identity = result.get("identity") or {}
    outputs, tensors = result.get("outputs") or {}, result.get("tensors") or {}
    lines = [f"{stage}  {_short(result.get('fingerprint'))}  {result.get('status')}"]
    if result.get("reason"):
        lines.append(f"  reason       {' '.join(str(result['reason']).split())}")
    for key, text in _main_options(stage, identity.get("options") or {}):
        lines.append(f"  {key:<12} {text}")
    for name, content in (result.get("inputs") or {}).items():
        lines.append(f"  from         {name} {_short(content)}")
    made = f"{len(outputs)} files" + (f", {len(tensors)} tensors" if tensors else "")
    lines.append(f"  output       {_short(result.get('output_hash'))} ({made})")
    versions = ", ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())
    backend = f"{environment['backend']} in " if environment.get("backend") else ""
    lock = _short(environment.get("lock_sha256")) if environment.get("lock_sha256") else "none, a named interpreter"
    lines.append(f"  environment  {backend}{environment.get('toolchain')}, lock {lock}; {versions}")
    if identity.get("code"):
        lines.append(f"  code         {identity.get('version')}, {len(identity['code'])} source files")
    lines.append(
        f"  made         {_when(timings.get('started_at'))}, {_seconds(timings.get('total_seconds'))}, on "
        f"{environment.get('device')} with {environment.get('threads')} threads"
    )
    return lines


def _main_options(stage: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    if stage == "download":
        model = options.get("model") or {}
        source = model.get("path") or f"{model.get('repo')} at {model.get('revision')}"
        return [("model", str(source))]
    if stage == "calibrate":
        spec = options.get("calibration") or {}
        return [("calibration", f"{spec.get('name')}, {spec.get('n_samples')} x {spec.get('seq_len')} tokens, "
                                f"seed {spec.get('seed')}")]  # fmt: skip
    if stage == "quantize":
        method = options.get("method") or {}
        return [("method", f"{method.get('name')}, {options.get('bits')} bits, groups of {options.get('group_size')}")]
    return []


def _verdict(chain: Lineage) -> str:
    metrics = chain.results.get("evaluate", {}).get("metrics") or {}
    if "reference_perplexity" not in metrics:
        return "verdict: none yet, it was not evaluated"
    parts = [f"perplexity {metrics['reference_perplexity']:.4g}"]
    ends = [metrics.get(f"nll_difference{end}") for end in ("", "_low", "_high")]
    known = [100 * growth(end) for end in ends if isinstance(end, (int, float))]
    if len(known) == len(ends) and all(map(math.isfinite, known)):
        middle, low, high = known
        parts.append(f"{middle:+.3g} % against float [{low:+.3g}, {high:+.3g}]")
    smoke = chain.results.get("serve_smoke")
    if smoke is not None:
        parts.append("served" if smoke.get("status") == "ok" else "not served")
    return f"verdict: {', '.join(parts)}"


def _short(value: object) -> str:
    return str(value)[:_SHORT] if value else "-"


def _when(started: float | None) -> str:
    return datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if started else "at an unknown time"


def _seconds(seconds: float | None) -> str:
    return f"{seconds:.1f} s" if seconds is not None else "-"
