"""Chooses the documents for calibration and their order, and cuts their token ids into samples.

Everything depends on the seed alone. Every choice uses a hash as a random number: `draw(seed, *what)` is the first 8
bytes, big-endian, of SHA-256 over its arguments joined by "/".

* A source's documents are its first `MAX_DOCUMENTS` rows, ordered by draw(seed, source, row).
* Packing `concat` cuts each document into pieces of at most `seq_len` tokens. The pieces are joined to a stream, each
  piece of plain text followed by the end-of-sequence token, and the stream is cut into samples. First comes one piece of
  every document, number draw(seed, source, row, "piece") modulo the number of pieces. Then comes the next piece of every
  document, and so on, wrapping around. So a few long documents do not crowd out the others.
* Packing `document` takes one window from each document of at least `seq_len` tokens. It starts at
  draw(seed, source, row, "window") modulo the number of possible starts. Shorter documents are skipped and counted.
* Sources share the samples by weight (largest remainder). All samples are ordered by draw(seed, "sample", source, i).

Plain text gets no special tokens except that separator. With a chat template, rows with `messages` are rendered as they
are, and rows with text as a single turn of the user. A rendered chat has its own special tokens and gets no separator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.config.data import CalibrationConfig, SourceConfig
from quantline.core.errors import UserError
from quantline.data.documents import Document

# Most rows to read from a source. Bounds time and memory for large data sets.
MAX_DOCUMENTS = 20_000


@dataclass
class Quota:
    """A source's share of the samples, filled step by step until `samples` has `wanted` rows of `seq_len` ids.

    `held` rows more are taken where the text has them; they come last.
    """

    name: str
    source: SourceConfig
    spec: CalibrationConfig
    wanted: int
    separator: int | None
    held: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    samples: list[list[int]] = field(default_factory=list)
    stream: list[int] = field(default_factory=list)  # joined, not yet cut
    later: list[list[NDArray[np.int32]]] = field(default_factory=list)  # of each document, pieces not yet joined
    read: int = 0
    used: int = 0
    empty: int = 0
    short: int = 0

    @property
    def full(self) -> bool:
        """Whether it has all samples, those to hold back included."""
        return len(self.samples) == self.wanted + self.held

    @property
    def enough(self) -> bool:
        """Whether it has all wanted samples."""
        return len(self.samples) >= self.wanted

    def add(self, document: Document, ids: Sequence[int]) -> None:
        """Add a document's ids; does nothing once full."""
        length = self.spec.seq_len
        if self.full:
            return
        if self.spec.packing == "document":
            if len(ids) < length:
                self.short += 1
                return
            start = draw(self.spec.seed, self.name, document.line, "window") % (len(ids) - length + 1)
            self.samples.append(list(ids[start : start + length]))
        else:
            pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
            first = draw(self.spec.seed, self.name, document.line, "piece") % max(1, len(pieces))
            self._join(pieces[first] if pieces else [])
            self.later.append([np.array(piece, dtype=np.int32) for piece in pieces[first + 1 :] + pieces[:first]])
        self.used += 1

    def add_later_pieces(self) -> None:
        """After the first piece of every document, add their second pieces, then their third ones, until full."""
        for rank in range(max(map(len, self.later), default=0)):
            for pieces in self.later:
                if rank < len(pieces) and not self.full:
                    self._join(pieces[rank].tolist())

    def _join(self, piece: Sequence[int]) -> None:
        length = self.spec.seq_len
        self.stream.extend(piece)
        if self.separator is not None:
            self.stream.append(self.separator)
        count = min(len(self.stream) // length, self.wanted + self.held - len(self.samples))
        self.samples.extend(self.stream[index * length : (index + 1) * length] for index in range(count))
        del self.stream[: count * length]

    def too_little(self, path: Path) -> UserError:
        """The error for a source with too little text for its samples."""
        spec, possible = self.spec, len(self.samples)
        what = f"{path}: source {self.name} must give {self.wanted} samples of {spec.seq_len} tokens"
        if spec.packing == "document":
            fact = f"{possible} of its {self.read} documents are that long, {self.short} are shorter"
            remedy = "set calibration.packing=concat, which joins short documents, lower calibration.seq_len"
        else:
            fact = f"its {self.used} documents give {possible}"
            remedy = "lower calibration.n_samples or calibration.seq_len"
        return UserError(f"{what}; {fact}; {remedy}, or give more text")

    def summary(self) -> dict[str, Any]:
        """The source's entry of the manifest."""
        return {
            **self.origin, "weight": self.source.weight, "samples": self.wanted, "documents_read": self.read,
            "documents_used": self.used, "documents_empty": self.empty, "documents_short": self.short,
            "tokens": self.wanted * self.spec.seq_len,
        }  # fmt: skip


def draw(seed: int, *what: object) -> int:
    """An unsigned 64-bit number that depends only on the arguments."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()[:8], "big")


def shares(weights: Mapping[str, float], n_samples: int) -> dict[str, int]:
    """Samples of each source: proportional to the weights, by largest remainder, ties go to the first name in order."""
    total = sum(weights.values())
    exact = {name: n_samples * weight / total for name, weight in weights.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in order[: n_samples - sum(counts.values())]:
        counts[name] += 1
    return counts
