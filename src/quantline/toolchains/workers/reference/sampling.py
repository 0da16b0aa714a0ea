"""Texts drawn from the float model itself, in the `reference` toolchain.

Each text starts from given ids and goes on until it is full; stop tokens do not stop it. The next token is drawn from
softmax(logits / temperature) by inverting its cumulative distribution at a random number that depends on the seed, the
text and the position alone, so that the batches do not matter.

Job: `checkpoint` (folder), `starts` (lists of token ids), `length` (tokens of each text), `temperature`, `seed`, `output`,
`device` and `threads`. The output has `input_ids` int32 (texts, length).
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.reference.engine import check_ids, prepare
from quantline.toolchains.workers.reference.streaming import StreamedModel

if TYPE_CHECKING:
    from torch import Tensor

# Texts in a batch. On 2 cores, 32 rows of a model of 135M take 1.6 times as long as 16.
_ROWS = 32


def uniforms(seed: int, text: int, length: int) -> NDArray[np.float64]:
    """The random numbers of one text, float64 (length,) in [0, 1)."""
    return np.random.Generator(np.random.PCG64([seed, text])).random(length)


def drawn(logits: Tensor, at: NDArray[np.float64], temperature: float) -> Tensor:
    """One token for each row: the first at which the cumulative distribution exceeds `at`.

    Args:
        logits: float32 (rows, vocabulary).
        at: float64 (rows,) in [0, 1).

    Returns:
        int64 (rows,).
    """
    import torch

    share = torch.softmax(logits.double() / temperature, dim=1).cumsum(dim=1)
    wanted = torch.from_numpy(at).to(logits.device)[:, None] * share[:, -1:]
    return torch.searchsorted(share, wanted, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def draw_texts(model: StreamedModel, job: Mapping[str, Any], report: Reporter) -> NDArray[np.int32]:
    """The texts of a job, int32 (texts, length).

    Raises:
        JobError: a start is empty or too long, or its ids are outside the vocabulary; the model keeps a state that is no
            cache of keys and values, or does not fit into memory.
    """
    starts, length = job["starts"], int(job["length"])
    for number, start in enumerate(starts, start=1):
        if not 0 < len(start) < length:
            raise JobError(f"text {number}: starts with {len(start)} tokens; give 1 to {length - 1}")
        check_ids(model.vocabulary, np.asarray(start))
    if model.model._is_stateful:
        raise JobError(
            f"{type(model.model).__name__}: text cannot be drawn from a model that keeps a state instead of keys and "
            "values; give your own text, calibration=jsonl calibration.path=FILE"
        )
    _check_memory(model)
    whole = model.whole()
    texts = np.empty((len(starts), length), dtype=np.int32)
    batches, total, done = _batches(starts), sum(length - len(start) for start in starts), 0
    for rows in batches:
        begun = len(starts[rows[0]])
        texts[rows, :begun] = np.array([starts[row] for row in rows], np.int32)
        random = np.stack([uniforms(int(job["seed"]), row, length) for row in rows])
        past: Any = None
        for place in range(begun, length):
            done += len(rows)
            taken = texts[rows, :place] if past is None else texts[rows, place - 1 : place]
            ids = _tensor(taken, model.device)
            answer = whole(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = answer.past_key_values
            chosen = drawn(answer.logits[:, -1].float(), random[:, place], float(job["temperature"]))
            texts[rows, place] = chosen.cpu().numpy()
            report(done, total, "tokens")
    return texts


def _tensor(ids: NDArray[np.int32], device: str) -> Tensor:
    import torch

    return torch.from_numpy(ids.astype(np.int64)).to(device)


def _batches(starts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of texts that start with equally many tokens, so that nothing is padded."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, start in enumerate(starts):
        by_length[len(start)].append(number)
    return [rows[first : first + _ROWS] for rows in by_length.values() for first in range(0, len(rows), _ROWS)]


def _check_memory(model: StreamedModel) -> None:
    """Each token needs every weight, so the model stays in memory, in float32."""
    needed = 4 * model.skeleton.parameters
    if model.device.startswith("cuda"):
        import torch

        given = torch.cuda.mem_get_info()[0]
    else:
        given = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > given:
        raise JobError(
            f"drawing text takes the whole model in float32, {needed / 2**30:.1f} GiB, but {model.device} has "
            f"{given / 2**30:.1f} GiB; give your own text, calibration=jsonl calibration.path=FILE"
        )


def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job, see the module's description.

    Raises:
        JobError: the device is missing, the model is refused, or `draw_texts` refuses.
    """
    import torch

    device = prepare(job)
    started = time.perf_counter()
    with torch.inference_mode():
        texts = draw_texts(StreamedModel(Path(job["checkpoint"]), device), job, report)
    write_safetensors(Path(job["output"]), {"input_ids": texts})
    return {"texts": len(texts), "tokens": int(texts.size), "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    worker_main(run)
