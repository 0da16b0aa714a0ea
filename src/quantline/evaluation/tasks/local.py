"""Two tasks made from any text, for lm-evaluation-harness. They need no network, and every model gets the same items.

`last_word`        a passage without its last word. The model must predict that word greedily, token by token, as in
                   LAMBADA (Paperno et al., "The LAMBADA dataset", 2016, arXiv:1606.06031). There people chose passages
                   whose last word follows from the whole; here it is a word that occurs earlier in the passage. Scored
                   by accuracy of the greedy answer, and by the perplexity of the word.
`multiple_choice`  a passage and several continuations. One is its own; the others continue other passages, of the same
                   document if it has enough of them. Scored by the likeliest continuation, by total (`acc`) and by length
                   normalized (`acc_norm`) log-likelihood, as in HellaSwag (Zellers et al., 2019, arXiv:1905.07830).

Passages are pieces of documents that do not overlap. Every document gives one passage before any gives a second. Their
order follows from the seed alone, so a smaller number of items is a prefix of a larger one. An item begins at a word, and
its answer begins after a single blank, which belongs to the answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.tasks import LastWordConfig, LocalTasksConfig, MultipleChoiceConfig
from quantline.core.errors import UserError
from quantline.evaluation.tasks.needle import NEEDLE, needle_items
from quantline.evaluation.tasks.own import ANSWERS, CHOICES

Item = dict[str, Any]
# A word that can be the answer: only letters, and enough of them not to be a particle.
_ANSWER = re.compile(r"[A-Za-z]{4,}")
# An answer is searched among this many words after a passage's context.
_ROOM = 24


@dataclass(frozen=True)
class Passage:
    """A piece of a document: its words as (begin, end) in characters of the text, and where an answer may begin."""

    text: str
    words: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]

    def between(self, first: int, last: int) -> str:
        """The text from word `first` up to but excluding word `last`."""
        return self.text[self.words[first][0] : self.words[last - 1][1]]


def last_word_items(options: LastWordConfig, texts: Sequence[str], seed: int, limit: int | None) -> list[Item]:
    """The items of `last_word`, each with `context` and `target`.

    Raises:
        UserError: the text has no passage long enough.
    """
    chance = random.Random(f"{seed} last_word")  # noqa: S311 (reproducible, not secret)
    found: list[Item] = []
    for passage in _spread(texts, options.context_words, _ROOM, chance):
        if len(found) == limit:
            break
        starts = [at for at in passage.starts if _occurs_before(passage, at, options.context_words)]
        if starts:
            at = chance.choice(starts)
            context, target = passage.between(at - options.context_words, at), passage.between(at, at + 1)
            found.append({"context": context, "target": f" {target}"})
    return _enough(found, "last_word")


def _occurs_before(passage: Passage, at: int, context_words: int) -> bool:
    word = passage.between(at, at + 1)
    if not _ANSWER.fullmatch(word):
        return False
    return re.search(rf"\b{word}\b", passage.between(at - context_words, at)) is not None


def multiple_choice_items(
    options: MultipleChoiceConfig, texts: Sequence[str], seed: int, limit: int | None
) -> list[Item]:
    """The items of `multiple_choice`, each with `context`, `choices` and `label`, the index of the true one.

    Raises:
        UserError: the text has no passage long enough, or too few of them.
    """
    chance = random.Random(f"{seed} multiple_choice")  # noqa: S311
    context_words, length = options.context_words, options.continuation_words

    def starts_of(passage: Passage) -> list[int]:
        return [at for at in passage.starts if at + length <= len(passage.words)]

    passages = [one for one in _spread(texts, context_words, _ROOM + length, chance) if starts_of(one)]
    places = [(passage, chance.choice(starts_of(passage))) for passage in passages]
    ends = [f" {passage.between(at, at + length)}" for passage, at in places]
    near: dict[str, list[str]] = {}
    for passage, end in zip(passages, ends, strict=True):
        near.setdefault(passage.text, []).append(end)
    everywhere = sorted(set(ends))
    found: list[Item] = []
    for (passage, at), end in zip(places, ends, strict=True):
        if len(found) == limit:
            break
        others = sorted(set(near[passage.text]) - {end})
        if len(others) < options.choices - 1:
            others = [one for one in everywhere if one != end]
        if len(others) < options.choices - 1:
            continue
        label = chance.randrange(options.choices)
        choices = chance.sample(others, options.choices - 1)
        choices.insert(label, end)
        found.append({"context": passage.between(at - context_words, at), "choices": choices, "label": label})
    return _enough(found, "multiple_choice")


def items_of(options: LocalTasksConfig, texts: Sequence[str], seed: int, limit: int | None) -> dict[str, list[Item]]:
    """The items of each task in the configuration, by its name.

    Raises:
        UserError: the text gives too few items of a task.
    """
    found = {}
    if options.last_word is not None:
        found["last_word"] = last_word_items(options.last_word, texts, seed, limit)
    if options.multiple_choice is not None:
        found["multiple_choice"] = multiple_choice_items(options.multiple_choice, texts, seed, limit)
    if options.needle is not None:
        found[NEEDLE] = needle_items(options.needle, texts, seed, limit)
    return found


def _spread(texts: Sequence[str], before: int, room: int, chance: random.Random) -> Iterator[Passage]:
    """Passages of `before` + `room` words: the first of every document, then the second ones, and so on."""
    piles = []
    for text in texts:
        words = [match.span() for match in re.finditer(r"\S+", text)]
        pile = []
        for first in range(0, len(words) - before - room + 1, before + room):
            own = tuple(words[first : first + before + room])
            starts = [at for at in range(before, len(own)) if text[own[at - 1][1] : own[at][0]] == " "]
            pile.append(Passage(text, own, tuple(starts)))
        chance.shuffle(pile)
        piles.append(pile)
    chance.shuffle(piles)
    for turn in range(max(map(len, piles), default=0)):
        yield from (pile[turn] for pile in piles if turn < len(pile))


def _enough(items: list[Item], name: str) -> list[Item]:
    if len(items) < 2:
        raise UserError(
            f"tasks.local.{name}: the text gives {len(items)} items, at least 2 are needed; give more text "
            "(tasks.path), or set fewer words"
        )
    return items


def write_tasks(items: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Write each task's items and its definition, `<name>.jsonl` and `<name>.yaml`, for lm-evaluation-harness.

    The definitions name the items by absolute path, and a cache beside them, so that the user's cache stays untouched.
    """
    import yaml

    for name, rows in items.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = folder / f"{name}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        definition = {
            "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0, "target_delimiter": "",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
            "doc_to_text": "context", "metadata": {"version": 1.0}, **_DEFINITIONS[name],
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition, sort_keys=False), encoding="utf-8")


def _metric(name: str, aggregation: str, higher: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


_GREEDY: dict[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_target": "target",
    "metric_list": [_metric("acc", "mean", True), _metric("perplexity", "perplexity", False)],
}
_CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [_metric("acc", "mean", True), _metric("acc_norm", "mean", True)],
}
_DEFINITIONS = {"last_word": _GREEDY, "multiple_choice": _CHOICE, NEEDLE: _GREEDY, ANSWERS: _GREEDY, CHOICES: _CHOICE}
