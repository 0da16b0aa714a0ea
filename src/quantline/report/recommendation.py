"""Which variant to ship: rules that a variant must meet, then preferences among those that do, with reasons.

Rules and preferences are data (conf/report). A missing value never passes silently: the rule defines whether it fails, and
if it does not, the recommendation lists it as not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantline.config.report import Preference, ReportConfig, Rule
from quantline.core.text import listed
from quantline.evaluation.bootstrap import caution
from quantline.report.evidence import Row
from quantline.report.units import Column, Kind, written

DEMO = "demo"
STARTING_GROWTH = 3.0  # per cent, as in conf/report
# The name of a column in a sentence, and the format of its values.
SPOKEN: dict[str, tuple[str, Kind]] = {
    "perplexity": ("perplexity", "number"),
    "difference_percent": ("growth of the perplexity", "growth"),
    "difference_low_percent": ("lower end of the interval of the perplexity's growth", "growth"),
    "difference_high_percent": ("upper end of the interval of the perplexity's growth", "growth"),
    "kl_divergence": ("KL divergence from float", "nats"),
    "kl_divergence_high": ("upper end of the interval of the KL divergence", "nats"),
    "top1_agreement": ("share of equal likeliest tokens", "share"),
    "top1_agreement_low": ("lower end of the interval of the share of equal likeliest tokens", "share"),
    "identical_generations": ("share of identical generations", "share"),
    "recovery_lowest": ("lowest share of float's score kept on a task", "share"),
    "recovery_lowest_low": ("lower end of the interval of the lowest share kept on a task", "share"),
    "tasks_passed": ("recovery on tasks", "yes"),
    "alarms": ("number of alarms", "count"),
    "served": ("served by vLLM here", "yes"),
    "size_bytes": ("size of the weights on disk", "bytes"),
    "compression_ratio": ("ratio of sizes, float to variant", "ratio"),
    "weights_memory_bytes": ("weights' memory in vLLM", "bytes"),
    "output_tokens_per_second": ("tokens per second, one request", "number"),
    "speed_up": ("speed-up over float", "ratio"),
    "slower_than_float": ("slower than float", "yes"),
    "load_seconds": ("load time", "seconds"),
    "quantize_seconds": ("time to quantize", "seconds"),
    "quantize_peak_bytes": ("peak memory of quantizing", "bytes"),
    "output_error_max": ("largest output error of a linear", "number"),
}
# Sentences for the usual rules, by whether they are met; for other rules a sentence is composed.
_SENTENCES = {
    ("difference_high_percent", True): "By the upper end of its interval, the perplexity grows by {value} ({allowed})",
    ("difference_high_percent", False): "By the upper end of its interval, the perplexity grows by {value} ({allowed})",
    ("served", True): "vLLM serves it here",
    ("served", False): "vLLM does not serve it here{refusal}",
    ("alarms", True): "The evaluation's instruments raised {value} alarm{s}",
    ("alarms", False): "The evaluation's instruments raised {value} alarm{s} ({allowed})",
    ("tasks_passed", True): "It keeps enough of the float model's score on every task",
    ("tasks_passed", False): "It keeps too little of the float model's score on a task",
}
_SUPERLATIVES = {
    ("size_bytes", "lowest"): "the smallest",
    ("speed_up", "highest"): "the fastest",
    ("output_tokens_per_second", "highest"): "the fastest",
    ("difference_percent", "lowest"): "the one that loses least quality",
    ("weights_memory_bytes", "lowest"): "the one that takes least memory",
}


@dataclass(frozen=True)
class Check:
    """One rule for one variant; sentence: the measured and the allowed value."""

    rule: str
    passed: bool
    measured: bool
    sentence: str


@dataclass(frozen=True)
class Recommendation:
    """chosen: the variant to ship, None if no variant meets the rules. reasons: as sentences. checks: by variant.

    ruled_out: variant -> the sentences of the rules that it fails. passed_over: variant -> why another one is preferred.
    caveats: values that were not measured.
    """

    chosen: str | None
    headline: str
    reasons: list[str]
    checks: dict[str, list[Check]]
    ruled_out: dict[str, list[str]] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    caveats: list[str] = field(default_factory=list)


def recommend(rows: Sequence[Row], options: ReportConfig, *, model: str = DEMO) -> Recommendation:
    """Apply rules and preferences to the rows of the variants' table; the baseline is not a candidate.

    Args:
        rows: of `tables.variants`.
        options: rules and preferences.
        model: as it is spoken of. The rules that this project comes with were chosen for the demo model.
    """
    candidates = [row for row in rows if not row["baseline"]]
    checks = {row["variant"]: [_check(name, rule, row) for name, rule in options.rules.items()] for row in candidates}
    ruled_out = {
        name: failed
        for name, found in checks.items()
        if (failed := [check.sentence for check in found if not check.passed])
    }
    fit = [row for row in candidates if row["variant"] not in ruled_out]
    if not candidates:
        return Recommendation(None, "None: no variant has been built yet.", [], {})
    if not fit:
        many = f"None of the {len(candidates)} variants meets"
        whose = "The only variant does not meet" if len(candidates) == 1 else many
        reason = f"{whose} every rule; each one's failures are below."
        return Recommendation(None, "None: keep serving the float model.", [reason], checks, ruled_out)
    best, steps, passed_over, caveats = _prefer(fit, options.prefer)
    name = best["variant"]
    reasons = [f"{_bargain(best)}.", *(f"{check.sentence}." for check in checks[name] if check.measured)]
    if len(candidates) > 1 and len(fit) == 1:
        reasons.append(f"It is the only one of {len(candidates)} variants that meets every rule.")
    elif len(fit) > 1:
        reasons.append(f"{listed([row['variant'] for row in fit])} meet every rule.")
    caveats = [f"{check.sentence}." for check in checks[name] if not check.measured] + caveats
    if few := caution(best.get("documents")):
        caveats.insert(0, f"{_capital(few)}.")
    if model != DEMO and any(_starting(rule) for rule in options.rules.values()):
        caveats.append(
            f"That the perplexity may grow by {written(STARTING_GROWTH, 'percent')} is what conf/report comes with, for the "
            f"demo model: what {model} may lose depends on its use. Set it there (docs/guide/limits.md)."
        )
    if best.get("slower_than_float"):
        caveats.insert(0, "It is slower than the float model at some concurrency here: it saves memory, not time.")
    return Recommendation(name, f"Ship {name}.", reasons + steps, checks, ruled_out, passed_over, caveats)


def _starting(rule: Rule) -> bool:
    return rule.column == "difference_high_percent" and rule.at_most == STARTING_GROWTH


def _bargain(row: Row) -> str:
    """Quality, size and speed against the float model, in one sentence."""
    parts = []
    growth = Column("difference_percent", "", "growth", "difference_low_percent", "difference_high_percent")
    if row.get("difference_percent") is not None:
        parts.append(f"perplexity {growth.text(row)}")
    if row.get("compression_ratio") is not None:
        parts.append(
            f"{written(row['compression_ratio'], 'ratio')} smaller on disk ({written(row['size_bytes'], 'bytes')})"
        )
    if row.get("speed_up") is not None:
        parts.append(f"{written(row['speed_up'], 'ratio')} as fast on average over the concurrencies measured")
    return f"Against the float model: {', '.join(parts)}" if parts else "It meets every rule"


def _check(name: str, rule: Rule, row: Row) -> Check:
    what, kind = SPOKEN[rule.column]
    value = row.get(rule.column)
    if value is None and rule.column == "tasks_passed" and row.get("recovery_lowest") is not None:
        kept = written(row["recovery_lowest"], "share")
        sentence = (
            "No limit is set for tasks (tasks.gate.min_recovery): the worst one keeps "
            f"{kept} of the float model's score"
        )
        return Check(name, rule.missing == "pass", False, sentence)
    if value is None:
        end = "which the rules ask for" if rule.missing == "fail" else "so this rule was not applied"
        return Check(name, rule.missing == "pass", False, f"{_capital(what)}: not measured, {end}")
    passed = _meets(rule, value)
    own = _SENTENCES.get((rule.column, passed)) if rule.equals is not False else None
    shown = abs(value) if rule.column == "difference_high_percent" and value > 0 else value
    text = written(shown, kind).lstrip("+") if own else written(value, kind)
    sentence = own or "{what}: {value} ({allowed})"
    if rule.column == "alarms" and value == 0:
        text = "no"
    refusal = f": {row['refusal']}" if row.get("refusal") else ""
    sentence = sentence.format(
        what=_capital(what), value=text, allowed=_allowed(rule, kind), refusal=refusal, s="" if value in (0, 1) else "s"
    )
    return Check(name, passed, True, sentence)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _meets(rule: Rule, value: float | bool) -> bool:
    if rule.equals is not None:
        return bool(value) == rule.equals
    if rule.at_most is not None:
        return value <= rule.at_most
    assert rule.at_least is not None
    return value >= rule.at_least


def _allowed(rule: Rule, kind: Kind) -> str:
    if rule.equals is not None:
        return f"must be {written(rule.equals, 'yes')}"
    if rule.at_most is not None:
        none = kind == "count" and rule.at_most == 0
        return "none is allowed" if none else f"at most {written(rule.at_most, kind).lstrip('+')} is allowed"
    return f"at least {written(rule.at_least, kind)} is wanted"


def _prefer(fit: list[Row], order: Sequence[Preference]) -> tuple[Row, list[str], dict[str, str], list[str]]:
    """The preferred row, the steps that led to it, why the others were passed over, and what was not measured."""
    left, steps, passed_over, caveats = list(fit), [], {}, []
    for preference in order:
        if len(left) == 1:
            break
        what, kind = SPOKEN[preference.column]
        known = [
            row for row in left if row.get(preference.column) is not None and math.isfinite(row[preference.column])
        ]
        if len(known) < len(left):
            names = [row["variant"] for row in left if row not in known]
            caveats.append(f"The {what} of {listed(names)} was not measured, so it did not decide.")
            continue
        best = (min if preference.best == "lowest" else max)(known, key=lambda row: row[preference.column])
        limit = abs(best[preference.column]) * preference.within_percent / 100
        near = [
            row for row in known
            if abs(row[preference.column] - best[preference.column]) <= limit or _overlap(row, best, preference.column)
        ]  # fmt: skip
        praise = _SUPERLATIVES.get((preference.column, preference.best), f"the one with the {preference.best} {what}")
        shown = written(best[preference.column], kind)
        for row in known:
            if row not in near:
                passed_over[row["variant"]] = (
                    f"{what} {written(row[preference.column], kind)}, against {shown} of {best['variant']}"
                )
        if len(near) == 1:
            steps.append(f"Of these {best['variant']} is {praise} ({shown}).")
        else:
            margin = f"within {preference.within_percent:g} % of {praise} ({shown})"
            if any(_overlap(row, best, preference.column) for row in near if row is not best):
                margin += " or overlap with its range"
            steps.append(f"{listed([row['variant'] for row in near])} are {margin}: no difference to choose by.")
        left = near
    for row in left[1:]:
        passed_over[row["variant"]] = f"as good as {left[0]['variant']} by every criterion, and later in params.yaml"
    return left[0], steps, passed_over, caveats


def _overlap(row: Row, other: Row, column: str) -> bool:
    """Whether the ranges of two measurements overlap; False if a range is missing."""
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    other_low, other_high = other.get(f"{column}_low"), other.get(f"{column}_high")
    if low is None or high is None or other_low is None or other_high is None:
        return False
    return bool(low <= other_high and other_low <= high)
