"""The reference engine: any known checkpoint as a float32 transformers model, in the `reference` toolchain.

Quantized linears are dequantized exactly, `w = (u - z) * s`, and the model uses plain matrix products. No quantized kernel
is involved, so only the weights are measured, on any device. If the checkpoint also rounds activations (W8A8), the inputs of
its linears are rounded as a server does it, per token. Every tensor of the checkpoint must match a parameter of the model,
and every parameter a tensor; otherwise an error names them. The model is computed part by part, see `streaming`.

Run as a worker, it computes the logits of a few sequences, by which other toolchains prove that they read the model in the
same way. Job: `checkpoint` (folder), `input_ids` (list of equally long lists, or a safetensors file with `input_ids`
(n, t)), `output`, `device` ("cpu" or "cuda") and `threads` (of the CPU). The output has `input_ids` int32 (n, t) and
`logits` float32 (n, t, vocabulary).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.reference.skeleton import Skeleton
from quantline.toolchains.workers.reference.streaming import StreamedModel


def load_model(folder: Path, device: str = "cpu") -> Any:
    """The whole transformers model of a checkpoint folder, see `Skeleton`.

    Raises:
        JobError: as `Skeleton`.
    """
    return Skeleton(folder, device).fill_all()


def check_ids(vocabulary: int, ids: NDArray[Any]) -> None:
    """Refuse token ids outside a model's vocabulary.

    Raises:
        JobError: an id is outside the vocabulary.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
        raise JobError(
            f"token ids are in [{ids.min()}, {ids.max()}], but the model knows {vocabulary}: "
            "they were made with another model's tokenizer"
        )


def prepare(job: Mapping[str, Any]) -> str:
    """Set a job's threads and deterministic arithmetic; return its device.

    Raises:
        JobError: this machine does not have the device.
    """
    import torch
    from transformers.utils import logging

    device = str(job.get("device", "cpu"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise JobError(f"device={device}: this machine has no GPU that torch can use; set device=cpu")
    torch.set_num_threads(int(job.get("threads", 1)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # TF32 keeps 10 of a float32's 23 mantissa bits, too few for the differences that are measured here.
    torch.set_float32_matmul_precision("highest")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return device


Measure = Callable[[StreamedModel, Mapping[str, Any], Reporter], dict[str, Any]]


def measuring(measure: Measure) -> Callable[[Mapping[str, Any], Reporter], dict[str, Any]]:
    """The `run` of a worker that measures something of the job's `model`, which is computed part by part.

    Raises, when it runs:
        JobError: the model is refused, or `measure` refuses.
    """

    def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
        import torch

        device = prepare(job)
        try:
            with torch.inference_mode():
                return measure(StreamedModel(Path(job["model"]), device), job, report)
        except UserError as error:
            raise JobError(str(error)) from error

    return run


def _probe_ids(given: Any) -> NDArray[np.int32]:
    from safetensors.numpy import load_file

    try:
        input_ids = np.array(load_file(given)["input_ids"] if isinstance(given, str) else given, dtype=np.int32)
    except ValueError as error:
        raise JobError(f"probe: input_ids are not equally long lists of token ids ({error})") from error
    if input_ids.ndim != 2 or not input_ids.size:
        raise JobError(f"probe: input_ids have shape {input_ids.shape}, not (sequences, tokens)")
    return input_ids


def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job, see the module's description.

    Raises:
        JobError: the device is missing, the model is refused, token ids do not fit it, or its logits are not finite.
    """
    import torch

    device = prepare(job)
    input_ids = _probe_ids(job["input_ids"])
    started = time.perf_counter()
    with torch.inference_mode():
        model = StreamedModel(Path(job["checkpoint"]), device)
        check_ids(model.vocabulary, input_ids)
        # One sequence at a time, so that its logits do not depend on the others.
        batches = [model.batch(row[None]) for row in input_ids]
        model.to_the_head(batches, report=report)
        logits = np.stack([model.logits(batch).cpu().numpy() for batch in batches])  # (n, t, vocabulary)
    if not logits.max() < np.inf:  # NaN is not smaller either; a model may mask tokens by -inf
        raise JobError(
            f"{job['checkpoint']}: its logits are NaN or infinite in float32; take weights that work elsewhere"
        )
    write_safetensors(Path(job["output"]), {"input_ids": input_ids, "logits": logits})
    return {
        "sequences": input_ids.shape[0], "tokens": input_ids.size, "vocabulary": logits.shape[2],
        "seconds": time.perf_counter() - started, "parameters": model.skeleton.parameters,
    }  # fmt: skip


if __name__ == "__main__":
    worker_main(run)
