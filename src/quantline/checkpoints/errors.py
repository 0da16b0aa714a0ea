"""The one error of the weight formats."""

from __future__ import annotations

from quantline.core.errors import UserError


class FormatError(UserError, ValueError):
    """A layout cannot hold, or does not hold, what it was given.

    The message states the fact and the remedy. It never names a tensor: these modules do not know the name, so the
    caller that does adds it.
    """
