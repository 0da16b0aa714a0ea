"""Compare a variant's greedy continuations with the float model's: after how many tokens they differ.

The prompts are the beginnings of evaluation documents. The reference engine continues them, or the server that serves the
variant, if the model is so large that the engine would read it for each new token. Where the two likeliest tokens are
nearly equally likely, any small change decides between them. A prompt is therefore left out as a tie if, at the first token
that differs, the margin of either model is `tie_margin` nats or less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.model_parts import parts_of
from quantline.config.evaluate import GenerationsConfig
from quantline.core.errors import UserError
from quantline.core.files import read_json
from quantline.data.windows import Windows
from quantline.serving import continuations

FILE = "generations.json"


@dataclass(frozen=True)
class Prompts:
    """Beginnings of documents: `tokens`, all of equal length, and the documents' names."""

    documents: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]


def choose_prompts(windows: Windows, count: int, length: int) -> Prompts:
    """The first `length` tokens of up to `count` documents, evenly spaced among those that are long enough."""
    first: dict[int, int] = {}
    for number, document in enumerate(windows.document):
        first.setdefault(int(document), number)
    begins = {document: int(windows.offsets[number]) for document, number in first.items()}
    long_enough = [document for document, number in first.items() if np.diff(windows.offsets)[number] >= length]
    if not long_enough or not count:
        return Prompts((), ())
    places = np.unique(np.linspace(0, len(long_enough) - 1, min(count, len(long_enough))).round().astype(int))
    chosen = [long_enough[place] for place in places]
    return Prompts(
        tuple(windows.document_ids[document] for document in chosen),
        tuple(tuple(windows.input_ids[begins[d] : begins[d] + length].tolist()) for d in chosen),
    )


def served_prompts(model: Path, windows: Windows, options: GenerationsConfig) -> Prompts:
    """The prompts that the server continues: none of a model whose weights the reference engine keeps.

    model: folder of the float model, which decides for its variants, too.
    """
    if parts_of(Checkpoint.open(model), read_json(model / "config.json")).kept:
        return Prompts((), ())
    return choose_prompts(windows, options.prompts, options.prompt_tokens)


def load_generations(folder: Path, prompts: Prompts) -> dict[str, Any]:
    """The float model's continuations, from the output of its evaluation.

    Raises:
        UserError: they are missing, or belong to other prompts.
    """
    path = folder / FILE
    found = read_json(path) if path.is_file() else {}
    if found.get("prompts") != [list(tokens) for tokens in prompts.tokens]:
        raise UserError(f"{path}: holds no continuations of these prompts; evaluate the float model again")
    return found


def engine_of(generations: Mapping[str, Any]) -> str:
    """Who continued the prompts: "reference" or the server's name."""
    return str(generations.get("engine", "reference"))


def served_generations(folder: Path, prompts: Prompts, new_tokens: int) -> dict[str, Any] | None:
    """The server's continuations, from the output of serve_smoke; None if it has none of these prompts and lengths."""
    path = folder / continuations.FILE
    found = read_json(path) if path.is_file() else {}
    if not prompts.tokens or found.get("prompts") != [list(tokens) for tokens in prompts.tokens]:
        return None
    if any(len(tokens) != new_tokens for tokens in found["tokens"]):
        return None
    return {key: found[key] for key in ("tokens", "margins", "engine")}


def compare_generations(
    documents: Sequence[str], own: Mapping[str, Any], floats: Mapping[str, Any], tie_margin: float
) -> dict[str, Any]:
    """Find where the continuations first differ.

    Args:
        documents: names of the prompts.
        own, floats: `tokens` and `margins`, lists (prompts, new_tokens).
        tie_margin: nats.

    Returns:
        prompts, new_tokens, ties, identical (share of the prompts without ties; None if all are ties),
        first_divergence_median (tokens before they differ; all tokens if they do not), and rows: document,
        first_divergence (None if the continuations are identical), float_margin and margin (at that token, in nats), tie.
    """
    rows: list[dict[str, Any]] = []
    for document, mine, theirs, margins, float_margins in zip(
        documents, own["tokens"], floats["tokens"], own["margins"], floats["margins"], strict=True
    ):
        first = next((place for place, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), None)
        at = None if first is None else (float_margins[first], margins[first])
        rows.append({
            "document": document, "first_divergence": first, "float_margin": at[0] if at else None,
            "margin": at[1] if at else None, "tie": at is not None and min(at) <= tie_margin,
        })  # fmt: skip
    length = len(own["tokens"][0])
    counted: list[int | None] = [row["first_divergence"] for row in rows if not row["tie"]]
    return {
        "prompts": len(rows),
        "new_tokens": length,
        "ties": len(rows) - len(counted),
        "tie_margin": tie_margin,
        "identical": sum(place is None for place in counted) / len(counted) if counted else None,
        "first_divergence_median": median(length if place is None else place for place in counted) if counted else None,
        "rows": rows,
    }
