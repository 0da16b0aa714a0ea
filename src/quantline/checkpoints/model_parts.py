"""The parts of a model that the reference engine computes one at a time: how large they are, and how many it keeps.

The engine and the plan of its memory share these numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts.linear_spec import LM_HEAD
from quantline.checkpoints.linears import numbered
from quantline.checkpoints.model_config import ties_head

# A model of at most this size in float32 keeps its weights, because it fits anywhere and continuations need every part for
# each token. Larger ones hold the part that computes and the next one.
KEEP_BYTES = 2 * 2**30
# Float32 values of one batch of logits: 1 GiB, unless a single window needs more. Two models that are compared share them.
MOST_LOGITS = 2**28


@dataclass(frozen=True)
class Parts:
    """Numbers of weights.

    Attributes:
        total: of the whole model; an output layer that is tied to the embeddings counts once.
        table: of the embeddings or the output layer, whichever is larger.
        layer: of the largest decoder layer.
    """

    total: int
    table: int
    layer: int

    @property
    def kept(self) -> bool:
        """Whether the engine keeps the model's weights."""
        return 4 * self.total <= KEEP_BYTES


def parts_of(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Parts:
    """The parts of a float model, from its headers."""
    layers: Counter[tuple[str, int]] = Counter()
    outside = [0]
    total = 0
    for name in checkpoint.names:
        if name == f"{LM_HEAD}.weight" and ties_head(config):
            continue
        values = math.prod(checkpoint.info(name).shape)
        total += values
        if place := numbered(name):
            layers[place[:2]] += values
        else:
            outside.append(values)
    return Parts(total, max(outside), max(layers.values(), default=0))
