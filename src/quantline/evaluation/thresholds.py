"""What a measurement beyond its limit is called: the alarms of an evaluation.

Each instrument looks at the variant in its own way. One alarm can be a model that is small and quantized hard; several at
once, or one that says that the weights are not those that were quantized, are a fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantline.core.errors import QuantlineError


@dataclass(frozen=True)
class Flag:
    """A limit that was passed: `value` beyond `limit`, and what it means."""

    instrument: str
    value: float
    limit: float
    message: str


@dataclass(frozen=True)
class _Instrument:
    metric: str  # that it reads
    above: bool  # whether too much is bad, or too little
    says: str

    @property
    def percent(self) -> bool:
        """Whether the value is told as a percentage; its limit is then told as one too."""
        return "%}" in self.says


# The instruments by the names of their limits.
INSTRUMENTS: dict[str, _Instrument] = {
    "perplexity_increase": _Instrument("perplexity_increase", True, "the perplexity grew by {value:.1%}"),
    "kl_divergence": _Instrument(
        "kl_divergence", True, "the next-token distributions are {value:.3g} nats a token from the float model's"
    ),
    "top1_agreement": _Instrument(
        "top1_agreement", False, "the likeliest token is the float model's at {value:.1%} of the places"
    ),
    "first_divergence": _Instrument(
        "first_divergence_median", False, "half of the greedy continuations leave the float model's within {value:g} tokens"
    ),
    "output_error_change": _Instrument(
        "output_error_change", True,
        "a linear's output error is {value:.1%} off what it was when it was quantized: these are not the weights that came "
        "out of quantization",
    ),
    "weight_error_change": _Instrument(
        "weight_error_change", True,
        "the error of a linear's weights is {value:.1%} off what it was when it was quantized",
    ),
    "changed_files": _Instrument(
        "changed_files", True, "{value:g} files of the checkpoint are not those that its conversion recorded"
    ),
    "output_error_outlier": _Instrument(
        "output_error_outlier", True, "a linear's output error is {value:.3g} times that of its kind"
    ),
    "restored_share": _Instrument(
        "restored_share_max", True, "one linear, put back to float, brings back {value:.1%} of the divergence"
    ),
}  # fmt: skip


def raised(measured: Mapping[str, float], limits: Mapping[str, float | None]) -> list[Flag]:
    """The alarms: where a measurement is beyond its limit, or is no number.

    Args:
        measured: metrics by name; what was not measured is absent.
        limits: by instrument; None is no limit.
    """
    flags = []
    for name, instrument in INSTRUMENTS.items():
        value, limit = measured.get(instrument.metric), limits.get(name)
        if value is None or limit is None:
            continue
        sound = not math.isnan(value) and (value <= limit if instrument.above else value >= limit)
        if not sound:
            side = "most" if instrument.above else "least"
            allowed = f"{100 * limit:g}%" if instrument.percent else f"{limit:g}"
            option = f"evaluate.limits.{name}={limit:g}"
            message = f"{instrument.says.format(value=value)}; at {side} {allowed} ({option})"
            flags.append(Flag(name, float(value), float(limit), message))
    return flags


def refuse(flags: Sequence[Flag], fail_on: Sequence[str]) -> None:
    """Fail where the configuration asks for it.

    Raises:
        QuantlineError: an instrument of `fail_on` raised an alarm.
    """
    fatal = [flag for flag in flags if flag.instrument in fail_on]
    if fatal:
        told = "; ".join(flag.message for flag in fatal)
        raise QuantlineError(f"evaluate.fail_on={','.join(flag.instrument for flag in fatal)}: {told}")


def rows(flags: Sequence[Flag]) -> list[dict[str, Any]]:
    """As plain values."""
    return [asdict(flag) for flag in flags]
