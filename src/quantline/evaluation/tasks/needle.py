"""A task made from any text: is a fact that stands far back in a long context still found?

A passage of the text gets a sentence, "The code of the KEY is NUMBER.", and ends with "The code of the KEY is": the model
must give the number greedily, token by token. The depth of the sentence goes through the passage from item to item, from
right before the question to the passage's start. Further sentences with other keys and numbers make it more than copying
the last number ("Needle in a haystack", Kamradt 2023; several needles as in RULER, arXiv:2404.06654).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from quantline.config.tasks import NeedleConfig
from quantline.core.errors import UserError

NEEDLE = "needle"
KEYS = ("garden", "harbor", "library", "mountain", "museum", "palace", "station", "theater", "tower", "village")
_DEPTHS = 5


def needle_items(options: NeedleConfig, texts: Sequence[str], seed: int, limit: int | None) -> list[dict[str, Any]]:
    """The items, each with `context`, `target` and `depth`, the share of the passage behind the sentence.

    Args:
        options: words of a passage, and how many sentences it gets.
        texts: documents; one passage of each before a second of any.
        seed: of everything that is drawn.
        limit: items; None takes all passages.

    Raises:
        UserError: the text has no two passages long enough.
    """
    chance = random.Random(f"{seed} needle")  # noqa: S311 (reproducible, not secret)
    piles = []
    for text in texts:
        words = re.findall(r"\S+", text)
        starts = range(0, len(words) - options.context_words + 1, options.context_words)
        piles.append([words[start : start + options.context_words] for start in starts])
    chance.shuffle(piles)
    passages = [
        pile[turn] for turn in range(max(map(len, piles), default=0)) for pile in piles if turn < len(pile)
    ]  # fmt: skip
    if len(passages) < 2:
        raise UserError(
            f"tasks.local.needle: the text gives {len(passages)} passages of {options.context_words} words, at least 2 are "
            "needed; give more text (tasks.path), or set fewer words"
        )
    return [_item(words, options, number, chance) for number, words in enumerate(passages[:limit])]


def _item(words: Sequence[str], options: NeedleConfig, number: int, chance: random.Random) -> dict[str, Any]:
    keys = chance.sample(KEYS, options.needles)
    codes = chance.sample(range(1000, 10_000), options.needles)
    depth = (number % _DEPTHS) / (_DEPTHS - 1)
    places = [round((1 - depth) * len(words)), *(chance.randrange(len(words) + 1) for _ in keys[1:])]
    said = sorted(zip(places, keys, codes, strict=True), key=lambda one: one[0], reverse=True)
    passage = list(words)
    for place, key, code in said:  # from the end, so that earlier places stay
        passage.insert(place, f"The code of the {key} is {code}.")
    return {"context": f"{' '.join(passage)} The code of the {keys[0]} is", "target": f" {codes[0]}", "depth": depth}
