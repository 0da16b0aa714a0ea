"""Calibration text that the float model writes itself: where each text starts, and the file that keeps them.

A chat model is given its template up to where a user's words begin, and writes the question and the answer (Magpie,
arXiv:2406.08464). A free text begins with the token that starts a text and one token drawn from the vocabulary (LLM-QAT,
arXiv:2305.17888). So nothing is fetched, and the text is of the kind that the model was trained on. The worker
`toolchains.workers.reference.sampling` draws the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.safetensors_file import SafetensorsFile
from quantline.config.data import SelfTextConfig
from quantline.data.sampling import draw
from quantline.data.tokenizer import TextEncoder
from quantline.toolchains.protocol import JobResult

TEXTS_NAME = "texts.jsonl"
_WORKER = ("reference", "quantline.toolchains.workers.reference.sampling")
_MARK = "\x01quantline\x01"

RunWorker = Callable[[str, str, dict[str, Any], str], JobResult]


@dataclass(frozen=True)
class Writer:
    """What lets the float model write: (toolchain, module, job, label) -> a worker's result, its device and threads."""

    run_worker: RunWorker
    device: str
    threads: int


def chat_start(encoder: TextEncoder) -> list[int]:
    """The ids of the model's chat template up to a user's words; empty where it has no template that can be split."""
    tokenizer = encoder.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        rendered = str(tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False))
    except Exception:  # a template is a program from the model; without it, texts start freely
        return []
    before, mark, _ = rendered.partition(_MARK)
    ids: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"] if mark else []
    return ids


def starts(encoder: TextEncoder, count: int, seed: int, how: SelfTextConfig) -> list[tuple[str, list[int]]]:
    """Where each of `count` texts starts: "chat" or "free", and its first ids. Kinds alternate by `chat_share`."""
    tokenizer, chat = encoder.tokenizer, chat_start(encoder)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else encoder.separator
    special = set(tokenizer.all_special_ids)
    known = [number for number in range(min(encoder.vocab_size, len(tokenizer))) if number not in special]
    share = how.chat_share if chat else 0.0
    found = []
    for number in range(count):
        if int((number + 1) * share) > int(number * share):
            found.append(("chat", chat))
        else:
            begun = known[draw(seed, "self", number) % len(known)]
            found.append(("free", [*([] if first is None else [first]), begun]))
    return found


def write(
    model_dir: Path, encoder: TextEncoder, *, count: int, length: int, seed: int, how: SelfTextConfig, writer: Writer
) -> tuple[NDArray[np.int64], list[str]]:
    """Let the float model write `count` texts of `length` tokens.

    Returns:
        int64 (count, length), and the lines of `TEXTS_NAME`: `start`, `text`, in order.

    Raises:
        UserError: the model cannot write, see the worker.
    """
    begun = starts(encoder, count, seed, how)
    with TemporaryDirectory(prefix="quantline-self-") as work:
        output = Path(work, "texts.safetensors")
        job = {
            "checkpoint": str(model_dir), "starts": [ids for _, ids in begun], "length": length, "seed": seed,
            "temperature": how.temperature, "output": str(output), "device": writer.device, "threads": writer.threads,
        }  # fmt: skip
        writer.run_worker(*_WORKER, job, "let the float model write calibration text")
        ids: NDArray[np.int64] = SafetensorsFile.open(output).read("input_ids").astype(np.int64)
    return ids, lines([kind for kind, _ in begun], encoder.tokenizer.batch_decode(ids.tolist()))


def lines(kinds: Sequence[str], texts: Sequence[str]) -> list[str]:
    """JSON lines of the texts."""
    return [
        json.dumps({"start": kind, "text": text}, ensure_ascii=False) for kind, text in zip(kinds, texts, strict=True)
    ]
