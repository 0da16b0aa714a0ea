"""Whether a variant may be promoted: every gate that does not hold, with what was measured and what is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantline.evaluation.nats import growth

_NEEDED = ("download", "quantize", "convert", "serve_smoke", "evaluate")


@dataclass(frozen=True)
class Gates:
    """What is asked for; see conf/promote/default.yaml."""

    max_perplexity_increase: float
    served: bool
    coverage: bool
    min_recovery: float
    max_alarms: int
    alarms: tuple[str, ...]


def faults_of(results: Mapping[str, Mapping[str, Any]], gates: Gates) -> list[str]:
    """Every gate that does not hold, in words; none where the variant may be promoted.

    Args:
        results: the variant's results by stage, those that are out of date left out.
        gates: what is asked for.
    """
    faults = [
        f"{stage}: has no result that is up to date; run `dvc repro`" for stage in _NEEDED if stage not in results
    ]
    metrics = {stage: dict(result.get("metrics") or {}) for stage, result in results.items()}
    if "evaluate" in results:
        faults += _quality(metrics["evaluate"], gates.max_perplexity_increase)
        raised = metrics["evaluate"].get("alarms", 0)
        if not _at_least(gates.max_alarms, raised):
            faults.append(f"alarms: the evaluation raised {_number(raised)}, promote.max_alarms={gates.max_alarms}")
    if gates.served and "serve_smoke" in results and results["serve_smoke"].get("status") != "ok":
        faults.append(f"served: it is not, {results['serve_smoke'].get('reason') or 'no reason given'}")
    if gates.coverage and "quantize" in results:
        faults += _coverage(metrics["quantize"])
    for stage in metrics.values():
        faults += [
            f"recovery: {name} is {_number(value)}, promote.min_recovery={gates.min_recovery:g}"
            for name, value in stage.items()
            if name.startswith("recovery/") and not _at_least(value, gates.min_recovery)
        ]
        faults += [
            f"alarms: {name} is {_number(stage[name])}, promote.alarms takes 0"
            for name in gates.alarms
            if name in stage and not _at_least(0, stage[name])
        ]
    return faults


def perplexity_increase_high(metrics: Mapping[str, Any]) -> float | None:
    """Upper end of the interval of perplexity's growth against float, as a share: exp(difference of mean losses) - 1."""
    high = metrics.get("nll_difference_high")
    if not isinstance(high, (int, float)):
        return None
    return growth(high)


def _quality(metrics: Mapping[str, Any], limit: float) -> list[str]:
    high = perplexity_increase_high(metrics)
    if high is None:
        return ["quality: the interval against float was not measured; run `dvc repro`"]
    if high <= limit:
        return []
    return [f"quality: perplexity may be {100 * high:+.3g} % against float, promote.max_perplexity_increase={limit:g}"]


def _coverage(metrics: Mapping[str, Any]) -> list[str]:
    expected, found = metrics.get("linears_expected"), metrics.get("linears_quantized")
    if expected is None or expected != found:
        return [f"coverage: {_number(found)} of {_number(expected)} linears were quantized"]
    # What is beyond a limit has failed the quantize stage; without an error nothing was held against the limits.
    return [] if "output_error_max" in metrics else ["coverage: no error was measured; set coverage.enabled=true"]


def _at_least(value: Any, limit: Any) -> bool:
    return isinstance(value, (int, float)) and isinstance(limit, (int, float)) and value >= limit


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "unknown"
