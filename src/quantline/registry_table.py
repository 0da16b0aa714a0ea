"""The registered versions as a table."""

from __future__ import annotations

from collections.abc import Sequence

import tabulate

from quantline.registry import Version

HEADERS = ("model", "version", "aliases", "variant", "fingerprint", "ppl", "Δ ppl at most", "served", "MB")
_MISSING = "-"


def render(versions: Sequence[Version]) -> str:
    """One row per version. Δ ppl at most: the upper end of its interval against float. MB are 10^6 bytes."""
    if not versions:
        return "nothing is registered yet; `python -m stages.promote variant=NAME alias=production` does it"
    return tabulate.tabulate([_row(item) for item in versions], HEADERS, disable_numparse=True)


def _row(item: Version) -> tuple[str, ...]:
    tags = item.tags
    high = _scaled(tags.get("quantline.perplexity_increase_high"), 100, "+.2f")
    return (
        item.model, item.version, " ".join(item.aliases) or _MISSING, tags["quantline.variant"],
        tags.get("quantline.fingerprint", "")[:12], _scaled(tags.get("quantline.perplexity"), 1, ".2f"),
        high if high == _MISSING else f"{high} %", tags.get("quantline.served", _MISSING),
        _scaled(tags.get("quantline.size_bytes"), 1e-6, ".1f"),
    )  # fmt: skip


def _scaled(text: str | None, factor: float, form: str) -> str:
    try:
        return format(float(text or "") * factor, form)
    except ValueError:
        return _MISSING
