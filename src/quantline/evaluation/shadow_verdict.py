"""Whether a variant is worse than another model on what users really asked: a paired verdict over captured requests.

The other model is the float model, or the variant that this one is to follow. Both score the text that users wrote. Answers
would not do: they were drawn from one model, and are likelier for it than for any other by the divergence of the two. The
difference of the losses is summed over a request and divided by all tokens; its interval resamples whole requests, as
`evaluate` resamples documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantline.config.evaluate import BootstrapConfig
from quantline.core.errors import UserError
from quantline.evaluation.bootstrap import Interval, paired_bootstrap
from quantline.evaluation.nats import growth

# With fewer requests an interval is often too narrow, so that no verdict is given.
FEWEST = 20


@dataclass(frozen=True)
class ShadowVerdict:
    """What the captured requests say.

    Attributes:
        verdict: `sound`: the whole interval is within the limit. `worse`: the whole interval is beyond it. `undecided`:
            the limit lies in it, or there are too few requests.
        requests, tokens: that were scored.
        difference: of the mean losses, variant minus the other, nats a token.
        limit: nats a token that are allowed.
        enough: about how many requests would decide; None if they have.
        largest: the requests that lost most, as positions among those given, and nats.
    """

    verdict: Literal["sound", "worse", "undecided"]
    requests: int
    tokens: int
    difference: Interval
    limit: float
    enough: int | None
    largest: tuple[tuple[int, float], ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the perplexity's increase beside the loss's."""
        own = asdict(self)
        interval = self.difference
        own["perplexity_increase"] = {
            "estimate": growth(interval.estimate), "low": growth(interval.low), "high": growth(interval.high),
        }  # fmt: skip
        return own


def judge(
    variant: Sequence[NDArray[np.float64]],
    other: Sequence[NDArray[np.float64]],
    *,
    most_increase: float,
    how: BootstrapConfig,
) -> ShadowVerdict:
    """The verdict.

    Args:
        variant, other: natural log-probabilities of each request's tokens, float64 (tokens,), of the same requests.
        most_increase: of the perplexity over the other's, such as 0.05.
        how: resamples, level and seed.

    Raises:
        UserError: the two are not of the same requests, or there are fewer than two.
    """
    if len(variant) != len(other) or any(a.shape != b.shape for a, b in zip(variant, other, strict=False)):
        raise UserError("the scores are of different requests; score the same captures with both models")
    places = [place for place, own in enumerate(variant) if len(own)]  # one token has no log-probability
    kept = [(variant[place], other[place]) for place in places]
    if len(kept) < 2:
        raise UserError(f"{len(kept)} captured requests can be scored; capture more (fleet.capture.share)")
    losses = np.array([-own.sum() for own, _ in kept])
    others = np.array([-base.sum() for _, base in kept])
    tokens = np.array([float(len(own)) for own, _ in kept])
    found = paired_bootstrap(losses, others, tokens, how)
    limit = math.log1p(most_increase)
    verdict: Literal["sound", "worse", "undecided"] = "undecided"
    if len(kept) >= FEWEST:
        verdict = "worse" if found.low > limit else "sound" if found.high <= limit else "undecided"
    order = np.argsort(-(losses - others), kind="stable")[:5]
    return ShadowVerdict(
        verdict, len(kept), int(tokens.sum()), found, limit,
        None if verdict != "undecided" else _enough(len(kept), found, limit),
        tuple((places[row], float(losses[row] - others[row])) for row in order),
    )  # fmt: skip


def _enough(requests: int, found: Interval, limit: float) -> int:
    """About how many requests bring the interval clear of the limit: its width shrinks with their root."""
    half, distance = (found.high - found.low) / 2, abs(found.estimate - limit)
    if distance == 0:
        return 100 * requests
    return max(FEWEST, min(100 * requests, math.ceil(requests * (half / distance) ** 2)))
