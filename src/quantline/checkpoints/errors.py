"""The error of the weight layouts."""

from __future__ import annotations

from quantline.core.errors import UserError


class FormatError(UserError, ValueError):
    """A layout cannot hold, or does not hold, what it was given.

    The message states the fault and the remedy. It never names a layer, which these modules do not know: the caller
    adds the name.
    """
