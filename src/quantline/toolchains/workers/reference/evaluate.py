"""All model computations of the evaluate stage, in one process of the `reference` toolchain, because starting it and loading
the models takes longer than much of the work.

Job: checkpoint, windows, output, batch_tokens, device and threads as in the reference engine's `score`. The other parts are
skipped if null or absent:

`baseline`     folder of the float model, loaded beside the checkpoint; the output gets `kl` float32 (tokens,), the
               Kullback-Leibler divergence KL(float || checkpoint) of the whole next-token distributions in nats, NaN at
               the first token of a window. Computed in float64 from float32 logits, a few rows at a time. Only
               for about `divergence_tokens` tokens (null means all), NaN at the others.
`generate`     prompts (lists of equally many token ids), new_tokens. Result `generations`: `tokens`, the greedy
               continuations without stop tokens, and `margins`, how far each is above the runner-up, in nats.
`layers`       linears (names), calibration, samples and unfold, as in `layer_errors`; needs `baseline`. Result `errors`:
               its rows, measured on this checkpoint.
`restore`      count, windows, output; needs `layers`. The `count` linears with the largest output errors are put back to
               float, one at a time, and the windows are scored again; the output has `logprobs` and `kl`, float32
               (1 + linears, tokens), the unchanged checkpoint first. Result `restored`: a row each, `name`, `tensor` (row of
               the output, or null) and `note`.

A method may have folded scales of a linear into its neighbours. The float weight is put back with the same scales, as far as
they can be recovered (`folded_scales`). Activations that a checkpoint rounds stay rounded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.reference import layer_errors
from quantline.toolchains.workers.reference.engine import check_ids, load_model, prepare, score, score_windows
from quantline.toolchains.workers.reference.folded_scales import folded_scales
from quantline.toolchains.workers.reference.progress import Parts

if TYPE_CHECKING:
    from torch import Tensor

# Values in a block of float64 probabilities, 32 MiB; and prompts per batch.
_BLOCK = 2**22
_PROMPTS = 16


def kl_divergence(floats: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(floats) || softmax(logits)) of each row, float64 (rows,) in nats; equal rows give exactly 0.

    floats, logits: float32 (rows, vocabulary).

    Raises:
        JobError: the vocabularies differ in size.
    """
    import torch

    if floats.shape != logits.shape:
        raise JobError(
            f"the float model has {floats.shape[1]} logits per token and the checkpoint {logits.shape[1]}: their "
            "distributions cannot be compared; set evaluate.divergence.tokens=0"
        )
    divergence = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    rows = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(logits), rows):
        block = slice(start, start + rows)
        expected = floats[block].double().log_softmax(dim=1)
        terms = expected.exp() * (expected - logits[block].double().log_softmax(dim=1))
        # Tokens of probability 0 in the float model add nothing. Rounding can give tiny negative sums.
        divergence[block] = terms.masked_fill(expected == -math.inf, 0.0).sum(dim=1).clamp(min=0)
    if divergence.isnan().any():
        raise JobError("the logits of the float model or of the checkpoint are NaN; they overflow in float32")
    return divergence


def divergence_from(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The `beside` function for `score_windows` that computes the divergence from a float model."""

    def compare(ids: Tensor, logits: Tensor) -> Tensor:
        return kl_divergence(model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1), logits).float()

    return compare


def continue_greedily(
    model: Any, prompts: NDArray[np.int32], new_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Continue prompts with the most likely token at each step.

    Args:
        prompts: int32 (n, length).

    Returns:
        tokens int32 (n, new_tokens), and how far each is above the runner-up, float32 in nats.
    """
    import torch

    tokens = np.empty((len(prompts), new_tokens), dtype=np.int32)
    margins = np.empty((len(prompts), new_tokens), dtype=np.float32)
    for start in range(0, len(prompts), _PROMPTS):
        rows = slice(start, start + _PROMPTS)
        ids, past = torch.from_numpy(prompts[rows].astype(np.int64)).to(model.device), None
        for place in range(new_tokens):
            answer = model(input_ids=ids, past_key_values=past, use_cache=True)
            best = answer.logits[:, -1].float().topk(2, dim=1)
            past, ids = answer.past_key_values, best.indices[:, :1]
            tokens[rows, place] = ids[:, 0].cpu().numpy()
            margins[rows, place] = (best.values[:, 0] - best.values[:, 1]).cpu().numpy()
    return tokens, margins


@contextmanager
def restored(model: Any, floats: Any, name: str, folded: bool) -> Iterator[None]:
    """Inside the block, a linear of `model` has the float model's weight.

    Raises:
        JobError: the linear has no separate weight in one of the models.
    """
    import torch

    quantized, weight = (dict(one.named_parameters()).get(f"{name}.weight") for one in (model, floats))
    if quantized is None or weight is None or quantized.shape != weight.shape:
        raise JobError("the model holds it in a stacked or fused tensor, so it cannot be put back alone")
    original = quantized.detach().clone()
    if folded:
        rows, columns = (torch.from_numpy(part) for part in folded_scales(original.cpu().numpy(), weight.cpu().numpy()))
        weight = weight * rows.to(weight.device)[:, None] * columns.to(weight.device)
    quantized.copy_(weight)
    try:
        yield
    finally:
        quantized.copy_(original)


def _generate(model: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    prompts = np.array(job["prompts"], dtype=np.int32)
    check_ids(model, prompts)
    tokens, margins = continue_greedily(model, prompts, int(job["new_tokens"]))
    return {"tokens": tokens.tolist(), "margins": [[round(float(m), 6) for m in row] for row in margins]}


def _restore(
    model: Any, floats: Any, measured: Mapping[str, Any], job: Mapping[str, Any], parts: Parts
) -> list[dict[str, Any]]:
    from safetensors.numpy import load_file

    windows = load_file(job["windows"])
    # A linear without an output error was not reached by any token.
    folded = bool(measured["unfolded"])
    known = [row for row in measured["rows"] if row["output_error"] is not None]
    worst = sorted(known, key=lambda row: -row["output_error"] if math.isfinite(row["output_error"]) else -math.inf)

    count = int(job["count"])

    def scores(at: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        ids, offsets, batch_tokens = windows["input_ids"], windows["offsets"], int(job["batch_tokens"])
        report = parts.of("restore", "linears put back" if at else "before putting back", at, count + 1)
        kept = score_windows(model, ids, offsets, batch_tokens, report, beside=divergence_from(floats))
        return kept["logprobs"], kept["kl"]

    rows: list[dict[str, Any]] = []
    scored = [scores(0)]
    for at, row in enumerate(worst[:count], 1):
        try:
            with restored(model, floats, row["name"], folded):
                scored.append(scores(at))
        except JobError as error:
            rows.append({"name": row["name"], "tensor": None, "note": str(error)})
            continue
        rows.append({"name": row["name"], "tensor": len(scored) - 1, "note": ""})
    logprobs, kl = (np.stack(part) for part in zip(*scored, strict=True))
    write_safetensors(Path(job["output"]), {"logprobs": logprobs, "kl": kl})
    return rows


def _sizes(job: Mapping[str, Any], *, beside: bool) -> dict[str, float]:
    """The parts of a job, in tokens through one model."""
    from safetensors import safe_open

    def tokens(path: str) -> int:
        with safe_open(path, "numpy") as file:
            return math.prod(file.get_slice("input_ids").get_shape())

    scored = tokens(job["windows"])
    compared = (min(scored, job.get("divergence_tokens") or scored)) if beside else 0
    sizes: dict[str, float] = {"score": scored + compared}
    if generate := job.get("generate"):
        sizes["generate"] = sum(len(prompt) + generate["new_tokens"] for prompt in generate["prompts"])
    if beside and (layers := job.get("layers")):
        with safe_open(layers["calibration"], "numpy") as file:
            sizes["layers"] = layers["samples"] * file.get_slice("input_ids").get_shape()[1]
        if restore := job.get("restore"):
            sizes["restore"] = 2 * (restore["count"] + 1) * tokens(restore["windows"])
    return sizes


def evaluate(model: Any, floats: Any, job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run the job's parts on the loaded models; `floats` is None without a baseline. `seconds` has the time of each part."""
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {"seconds": seconds}
    parts = Parts(report, _sizes(job, beside=floats is not None))

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[part] = time.perf_counter() - started

    with timed("score"):
        beside = None if floats is None else divergence_from(floats)
        result |= score(model, job, parts.of("score", "scoring"), beside)
    if job.get("generate"):
        with timed("generate"):
            result["generations"] = _generate(model, job["generate"])
        parts.of("generate", "continuing prompts")(1, 1)
    if job.get("layers") and floats is not None:
        with timed("layers"):
            layers = {**job["layers"], "model": job["baseline"], "checkpoint": job["checkpoint"]}
            measured = layer_errors.measure(floats, layers, parts.of("layers", "errors of linears"))
            result["errors"] = measured["rows"]
        if job.get("restore"):
            with timed("restore"):
                restore = {"batch_tokens": job["batch_tokens"], **job["restore"]}
                result["restored"] = _restore(model, floats, measured, restore, parts)
    return result


def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job, see the module's description.

    Raises:
        JobError: the reference engine or `layer_errors` refuses.
    """
    import torch

    device = prepare(job)
    try:
        with torch.inference_mode():
            model = load_model(Path(job["checkpoint"]), device)
            floats = load_model(Path(job["baseline"]), device) if job.get("baseline") else None
            return evaluate(model, floats, job, report)
    except UserError as error:
        raise JobError(str(error)) from error


if __name__ == "__main__":
    worker_main(run)
