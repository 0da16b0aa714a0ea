"""Greedy continuations by the reference engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantline.toolchains.protocol import JobError, Reporter
from quantline.toolchains.workers.reference.engine import check_ids
from quantline.toolchains.workers.reference.streaming import StreamedModel

# Prompts in a batch.
_PROMPTS = 16


def continue_greedily(
    model: StreamedModel, prompts: Sequence[Sequence[int]], new_tokens: int, report: Reporter
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Continue prompts with the most likely token at each step; stop tokens do not stop it.

    A model that keeps its weights computes one token at a time, if it has a cache of keys and values alone. Others are
    read, or compute the whole text, once for each new token.

    Args:
        prompts: n lists of token ids.

    Returns:
        tokens int32 (n, new_tokens), and how far each is above the runner-up, float32 in nats.

    Raises:
        JobError: a prompt is empty, or token ids are outside the vocabulary.
    """
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise JobError(f"generate: prompt {number} has no tokens")
    tokens = np.empty((len(prompts), new_tokens), dtype=np.int32)
    margins = np.empty((len(prompts), new_tokens), dtype=np.float32)
    groups = [(rows, np.array([prompts[row] for row in rows], np.int32)) for rows in _groups(prompts)]
    for _, ids in groups:
        check_ids(model.vocabulary, ids)
    if model.keeps and not model.model._is_stateful:  # such as Mamba
        for number, (rows, ids) in enumerate(groups, start=1):
            tokens[rows], margins[rows] = _cached(model, ids, new_tokens)
            report(number, len(groups), "continuations")
        return tokens, margins
    for place in range(new_tokens):
        batches = [model.batch(np.concatenate([ids, tokens[rows, :place]], axis=1)) for rows, ids in groups]
        model.to_the_head(batches, lambda _done, _total, _label: None)
        for (rows, _), batch in zip(groups, batches, strict=True):
            logits = model.logits(batch).unflatten(0, tuple(batch.ids.shape))[:, -1]
            best = logits.topk(2, dim=1)
            tokens[rows, place] = best.indices[:, 0].cpu().numpy()
            margins[rows, place] = (best.values[:, 0] - best.values[:, 1]).cpu().numpy()
        model.release()
        report(place + 1, new_tokens, "new tokens")
    return tokens, margins


def _groups(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of prompts of equal length, in batches, so that nothing is padded."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_length[len(prompt)].append(number)
    return [rows[start : start + _PROMPTS] for rows in by_length.values() for start in range(0, len(rows), _PROMPTS)]


def _cached(
    model: StreamedModel, prompts: NDArray[np.int32], new_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    import torch

    whole = model.whole()
    tokens = np.empty((len(prompts), new_tokens), dtype=np.int32)
    margins = np.empty((len(prompts), new_tokens), dtype=np.float32)
    ids, past = torch.from_numpy(prompts.astype(np.int64)).to(model.device), None
    for place in range(new_tokens):
        # Not `generate`, because it would apply the checkpoint's generation settings.
        answer = whole(input_ids=ids, past_key_values=past, use_cache=True)
        best = answer.logits[:, -1].float().topk(2, dim=1)
        past, ids = answer.past_key_values, best.indices[:, :1]
        tokens[:, place] = ids[:, 0].cpu().numpy()
        margins[:, place] = (best.values[:, 0] - best.values[:, 1]).cpu().numpy()
    return tokens, margins
