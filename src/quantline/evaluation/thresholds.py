"""The alarms of an evaluation: measurements beyond their limits.

`config.evaluate.LimitsConfig` defines which measurements have a limit and the text of each alarm. One alarm can come from
a small model at few bits. Several alarms together are a fault, and so is one which says that the weights are not those that
were quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantline.config.limits import ALARMS, Alarm, LimitsConfig
from quantline.core.errors import QuantlineError
from quantline.core.text import counted, digits, percent


@dataclass(frozen=True)
class RaisedAlarm:
    """An alarm: `value` of the measurement `instrument` is beyond `limit`; `message` says what that means."""

    instrument: str
    value: float
    limit: float
    message: str


def raised(measured: Mapping[str, float], limits: LimitsConfig | None) -> list[RaisedAlarm]:
    """The alarms: measurements that exceed their limits or are NaN.

    Args:
        measured: metrics by name; what was not measured is absent.
        limits: the configured limits; None raises no alarm.
    """
    flags = []
    for name, alarm in ALARMS.items():
        value, limit = measured.get(alarm.metric), getattr(limits, name, None)
        if value is None or limit is None:
            continue
        sound = not math.isnan(value) and (value <= limit if alarm.above else value >= limit)
        if not sound:
            side = "most" if alarm.above else "least"
            option = f"evaluate.limits.{name}={limit:g}"
            said = alarm.says.format(value=_written(alarm, value))
            message = f"{said}; at {side} {_written(alarm, limit, whole=True)} ({option})"
            flags.append(RaisedAlarm(name, float(value), float(limit), message))
    return flags


def _written(alarm: Alarm, value: float, *, whole: bool = False) -> str:
    """A measured value for reading; with `whole` a limit, with all the digits that it was given."""
    match alarm.kind:
        case "share":
            return f"{100 * value:g} %" if whole else percent(value)
        case "token" | "file":
            return counted(value, alarm.kind)
        case _:
            return f"{value:g}" if whole else digits(value, 3)


def refuse(flags: Sequence[RaisedAlarm], fail_on: Sequence[str]) -> None:
    """Fail if one of the named measurements raised an alarm.

    Raises:
        QuantlineError: a measurement of `fail_on` raised an alarm.
    """
    fatal = [flag for flag in flags if flag.instrument in fail_on]
    if fatal:
        messages = "; ".join(flag.message for flag in fatal)
        raise QuantlineError(f"evaluate.fail_on={','.join(flag.instrument for flag in fatal)}: {messages}")


def rows(flags: Sequence[RaisedAlarm]) -> list[dict[str, Any]]:
    """The alarms as plain values."""
    return [asdict(flag) for flag in flags]
