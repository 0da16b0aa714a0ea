"""The promotion gates: every gate that a variant fails, with the measured and the required value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantline.config.promote import PromoteConfig
from quantline.evaluation.nats import growth
from quantline.pipeline.stages import names

_NEEDED = names(lambda stage: stage.gated)


def faults_of(
    results: Mapping[str, Mapping[str, Any]],
    gates: PromoteConfig,
    remedy: Callable[[str], str] = lambda stage: "dvc repro",
) -> list[str]:
    """Every gate that a variant fails, one sentence each; empty if it may be promoted.

    Args:
        results: the variant's up-to-date results by stage.
        gates: the limits in the configuration.
        remedy: the command that makes the result of a stage.
    """
    faults = [f"{stage}: has no up-to-date result; run: {remedy(stage)}" for stage in _NEEDED if stage not in results]
    metrics = {stage: dict(result.get("metrics") or {}) for stage, result in results.items()}
    if "evaluate" in results:
        faults += _quality(metrics["evaluate"], gates.max_perplexity_increase)
        raised = metrics["evaluate"].get("alarms", 0)
        if not _at_least(gates.max_alarms, raised):
            faults.append(
                f"alarms: the evaluation raised {_number(raised)}, allowed is promote.max_alarms={gates.max_alarms}"
            )
    if gates.served and "serve_smoke" in results and results["serve_smoke"].get("status") != "ok":
        faults.append(f"served: vLLM does not serve it, {results['serve_smoke'].get('reason') or 'no reason given'}")
    if gates.layer_errors and "quantize" in results:
        faults += _layer_errors(metrics["quantize"])
    for stage in metrics.values():
        faults += [
            f"recovery: {name} is {_number(value)}, required is promote.min_recovery={gates.min_recovery:g}"
            for name, value in stage.items()
            if name.startswith("recovery/") and not _at_least(value, gates.min_recovery)
        ]
        faults += [
            f"alarms: {name} is {_number(stage[name])}, promote.alarms allows 0"
            for name in gates.alarms
            if name in stage and not _at_least(0, stage[name])
        ]
    return faults


def perplexity_increase_high(metrics: Mapping[str, Any]) -> float | None:
    """Upper end of the interval of the relative perplexity increase over float: exp(difference of mean losses) - 1."""
    high = metrics.get("nll_difference_high")
    if not isinstance(high, (int, float)):
        return None
    return growth(high)


def _quality(metrics: Mapping[str, Any], limit: float) -> list[str]:
    high = perplexity_increase_high(metrics)
    if high is None:
        return ["quality: the interval of the perplexity increase was not measured; run `dvc repro`"]
    if high <= limit:
        return []
    return [
        f"quality: perplexity may be {100 * high:+.3g} % against float, allowed is promote.max_perplexity_increase={limit:g}"
    ]


def _layer_errors(metrics: Mapping[str, Any]) -> list[str]:
    expected, quantized = metrics.get("linears_expected"), metrics.get("linears_quantized")
    if expected is None or expected != quantized:
        return [f"layer errors: {_number(quantized)} of {_number(expected)} linears were quantized"]
    # An error beyond a limit fails the quantize stage, so here it is enough that errors were measured.
    return (
        [] if "output_error_max" in metrics else ["layer errors: no error was measured; set layer_errors.enabled=true"]
    )


def _at_least(value: Any, limit: Any) -> bool:
    return isinstance(value, (int, float)) and isinstance(limit, (int, float)) and value >= limit


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "unknown"
