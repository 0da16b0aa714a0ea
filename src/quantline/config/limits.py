"""The limits of the evaluation's measurements, and the alarm that each one raises.

Unlike the rest of `config` this is part of a stage's code (`quantline.pipeline.code`): the alarms stand in its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from pydantic_core import PydanticKnownError

from quantline.config.section import Section


@dataclass(frozen=True)
class Alarm:
    """What a measurement beyond its limit means.

    Attributes:
        metric: the metric that is compared with the limit.
        says: the message; `value` is the measured value.
        above: values above the limit raise the alarm; if false, values below it.
        kind: how value and limit are written: a share as per cent, tokens and files as counts with their noun.
    """

    metric: str
    says: str
    above: bool = True
    kind: Literal["number", "share", "token", "file"] = "number"


_CHANGED = "the weights have changed since then"


class LimitsConfig(Section):
    """The limits beyond which a measurement raises an alarm; null is no limit.

    This is the only list of them: `evaluate.fail_on` and `evaluation.thresholds` read it.
    """

    perplexity_increase: Annotated[
        float | None, Field(gt=0), Alarm("perplexity_increase", "the perplexity grew by {value}", kind="share")
    ]
    kl_divergence: Annotated[
        float | None,
        Field(gt=0),
        Alarm("kl_divergence", "the next-token distributions are {value} nats a token from the float model's"),
    ]
    top1_agreement: Annotated[
        float | None,
        Field(gt=0, le=1),
        Alarm(
            "top1_agreement",
            "the top-1 token matches the float model's at {value} of the positions",
            above=False,
            kind="share",
        ),
    ]
    first_divergence: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "first_divergence_median",
            "half of the greedy continuations diverge from the float model's within {value}",
            above=False,
            kind="token",
        ),
    ]
    output_error_change: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "output_error_change",
            f"a linear's output error is {{value}} off the one measured after quantization: {_CHANGED}",
            kind="share",
        ),
    ]
    weight_error_change: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "weight_error_change",
            "the error of a linear's weights is {value} off the one measured after quantization",
            kind="share",
        ),
    ]
    changed_files: Annotated[
        int | None,
        Field(ge=0),
        Alarm("changed_files", "the conversion record does not hold for {value} of the checkpoint", kind="file"),
    ]
    output_error_outlier: Annotated[
        float | None,
        Field(gt=1),
        Alarm("output_error_outlier", "a linear's output error is {value} times that of its kind"),
    ]
    rounding_ratio: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "rounding_ratio",
            "on held back samples its linears are {value} times as far from the float model as rounding to nearest",
        ),
    ]
    restored_share: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "restored_share_max", "putting one linear back to float recovers {value} of the divergence", kind="share"
        ),
    ]


ALARMS: dict[str, Alarm] = {
    name: next(part for part in field.metadata if isinstance(part, Alarm))
    for name, field in LimitsConfig.model_fields.items()
}


def has_a_limit(name: str) -> str:
    """Validate the name of a measurement that has a limit."""
    if name not in ALARMS:
        *first, last = (f"'{known}'" for known in ALARMS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}"})
    return name
