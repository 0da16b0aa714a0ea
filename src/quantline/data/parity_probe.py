"""The parity probe: the float model's logits on fixed token ids.

Every toolchain computes them before it quantizes, to prove that it loads the same model. An old toolchain can misread a new
config.json silently (a rope_theta of 1e6 became 1e4).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.model_config import dimensions, read_config
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobResult

TOKENS = 192


def probe_ids(vocab_size: int) -> list[list[int]]:
    """Two rows of token ids, spread over the vocabulary by a fixed stride. They depend only on its size."""
    # Long rows, because a wrong rotary base shows at distant positions, not at the first few.
    return [[(17 + row * 7919 + 104729 * position) % vocab_size for position in range(TOKENS)] for row in range(2)]


def vocab_size_of(model: Path) -> int:
    """The number of rows of the token embedding: as config.json says, or from the checkpoint's headers.

    Raises:
        UserError: config.json does not say, and no tensor has the name of a token embedding.
    """
    said = dimensions(read_config(model)).vocabulary
    if said is not None:
        return said
    checkpoint = Checkpoint.open(model)
    for name in checkpoint.names:
        if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")):
            return int(checkpoint.info(name).shape[0])
    raise UserError(f"{model}: has no token embedding; give a causal language model")


def record_probe(
    run_worker: Callable[[str, str, dict[str, Any], str], JobResult], model: Path, out: Path
) -> dict[str, float]:
    """Write the reference engine's logits for `model` to `out` (safetensors: input_ids int32, logits float32)."""
    job = {"checkpoint": str(model), "input_ids": probe_ids(vocab_size_of(model)), "output": str(out)}
    result = run_worker("reference", "quantline.toolchains.workers.reference.engine", job, "reference logits")
    return {"probe_seconds": result.seconds}
