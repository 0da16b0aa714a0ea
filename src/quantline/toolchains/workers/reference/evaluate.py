"""All model computations of the evaluate stage, in one process of the `reference` toolchain, because starting it takes
longer than much of the work.

Job: checkpoint (folder), windows (safetensors: `input_ids` int32 (tokens,), `offsets` int64 (windows + 1,)), output,
batch_tokens, device ("cpu" or "cuda"), threads (of the CPU) and gpus (processes that score a share of the windows each, see
`ranks`; the results are the same). The output has `logprobs` float32 (tokens,), the natural
logarithm of each token's probability given the tokens before it in its window, NaN at the first; and `top1` int32 (tokens,),
the most likely token at that position, -1 at the first. The other parts are skipped if null or absent:

`baseline`     folder of the float model, which goes through its layers beside the checkpoint; the output gets `kl` float32
               (tokens,), the Kullback-Leibler divergence KL(float || checkpoint) of the whole next-token distributions
               in nats, NaN at the first token of a window. Only for about `divergence_tokens` tokens (null means all),
               NaN at the others. Result `states`: a row for each part of the model, `name`, and `state_error`, how far
               its output is from the float model's, ||H' - H|| / ||H||, over the same tokens.
`generate`     prompts (lists of token ids), new_tokens. Result `generations`: `tokens`, the greedy
               continuations without stop tokens, and `margins`, how far each is above the runner-up, in nats.
`layers`       linears (names), calibration, samples and unfold, as in `layer_errors`; needs `baseline`. Result `errors`:
               its rows, measured on this checkpoint.
`restore`      count, windows, output; needs `layers`. The `count` linears with the largest output errors are put back to
               float, one at a time, and the windows are scored again; the output has `logprobs` and `kl`, float32
               (1 + linears, tokens), the unchanged checkpoint first. Result `restored`: a row each, `name`, `tensor` (row of
               the output, or null) and `note`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.ranks import Team, team
from quantline.toolchains.workers.reference import layer_errors
from quantline.toolchains.workers.reference.engine import check_ids, prepare
from quantline.toolchains.workers.reference.generating import continue_greedily
from quantline.toolchains.workers.reference.progress import Parts
from quantline.toolchains.workers.reference.restoring import Restoring
from quantline.toolchains.workers.reference.scoring import Scoring
from quantline.toolchains.workers.reference.streaming import StreamedModel

# Tokens that take about as long to compute as a large model takes to be read and dequantized: 5 to 20 s of one of 8 billion
# parameters beside an H200, see docs/benchmarks.md. A CPU computes fewer in that time.
_READ = {"cuda": 10_000, "cpu": 200}


def _generate(model: StreamedModel, job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    tokens, margins = continue_greedily(model, job["prompts"], int(job["new_tokens"]), report)
    return {"tokens": tokens.tolist(), "margins": [[round(float(m), 6) for m in row] for row in margins]}


def _worst(measured: Mapping[str, Any], count: int) -> list[str]:
    # A linear without an output error was not reached by any token.
    known = [row for row in measured["rows"] if row["output_error"] is not None]
    worst = sorted(known, key=lambda row: -row["output_error"] if math.isfinite(row["output_error"]) else -math.inf)
    return [row["name"] for row in worst[:count]]


def _sizes(job: Mapping[str, Any], *, beside: bool, reads: int) -> dict[str, float]:
    """The parts of a job in their order, in tokens through one model.

    reads: tokens that take as long as reading the model, if it is read again for each new token; else 0.
    """
    from safetensors import safe_open

    def tokens(path: str) -> int:
        with safe_open(path, "numpy") as file:
            return math.prod(file.get_slice("input_ids").get_shape())

    sizes: dict[str, float] = {}
    if (generate := job.get("generate")) and reads:
        sizes["generate"] = generate["new_tokens"] * reads
    elif generate:
        sizes["generate"] = sum(len(prompt) + generate["new_tokens"] for prompt in generate["prompts"])
    if beside and (layers := job.get("layers")):
        with safe_open(layers["calibration"], "numpy") as file:
            sizes["layers"] = layers["samples"] * file.get_slice("input_ids").get_shape()[1]
    scored = tokens(job["windows"])
    sizes["score"] = scored + (min(scored, job.get("divergence_tokens") or scored) if beside else 0)
    if "layers" in sizes and (restore := job.get("restore")):
        # The worst linears are anywhere: on average half of the layers are computed again.
        sizes["score"] += (2 + restore["count"] / 2) * tokens(restore["windows"])
    return sizes


def evaluate(
    model: StreamedModel, floats: StreamedModel | None, job: Mapping[str, Any], report: Reporter, ranks: Team
) -> dict[str, Any]:
    """Run the job's parts; `floats` is None without a baseline. `seconds` has the time of each part.

    Ranks other than 0 only score, and leave their scores to rank 0.

    Raises:
        JobError: token ids are outside the vocabulary, or log-probabilities are NaN.
    """
    from safetensors.numpy import load_file

    seconds: dict[str, float] = {}
    result: dict[str, Any] = {"seconds": seconds}
    measured: dict[str, Any] | None = None
    parts = Parts(report, _sizes(job, beside=floats is not None, reads=0 if model.keeps else _READ[model.device[:4]]))
    windows = load_file(job["windows"])
    check_ids(model.vocabulary, windows["input_ids"])
    if ranks.rank:
        return _leave(model, floats, job, windows, ranks)

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[part] = time.perf_counter() - started

    if job.get("generate"):
        with timed("generate"):
            result["generations"] = _generate(model, job["generate"], parts.of("generate", "continuing prompts"))
    if job.get("layers") and floats is not None:
        with timed("layers"):
            layers = {**job["layers"], "checkpoint": job["checkpoint"]}
            measured = layer_errors.measure(floats, layers, parts.of("layers", "errors of linears"))
            result["errors"] = measured["rows"]
    with timed("score"):
        scoring = Scoring(model, floats, int(job.get("batch_tokens", 4096)))
        restoring = None
        if job.get("restore") and measured is not None and floats is not None:
            part = load_file(job["restore"]["windows"])
            names = _worst(measured, int(job["restore"]["count"]))
            restoring = Restoring(
                model, floats, scoring.windows(part), len(part["input_ids"]), names, folded=bool(measured["unfolded"])
            )
        batches = scoring.windows(windows, job.get("divergence_tokens"))
        own, tokens = batches[ranks.share], len(windows["input_ids"])
        scores = scoring.score(tokens, own, parts.of("score", "scoring"), restoring)
        for left in ranks.results():
            scores.add(load_file(left["scores"]), left["parts"])
    if restoring is not None:
        seconds["restore"] = scores.beside_seconds
        seconds["score"] -= scores.beside_seconds
    lost = int(np.isnan(scores.logprobs).sum()) - int((np.diff(windows["offsets"]) > 0).sum())
    if lost:
        raise JobError(f"{job['checkpoint']}: {lost} log-probabilities are NaN; the weights overflow in float32")
    write_safetensors(Path(job["output"]), scores.tensors())
    if restoring is not None:
        result["restored"], tensors = restoring.result()
        write_safetensors(Path(job["restore"]["output"]), tensors)
    return {**result, "states": scores.states(), "tokens": tokens, "tokens_per_second": tokens / seconds["score"]}


def _leave(
    model: StreamedModel, floats: StreamedModel | None, job: Mapping[str, Any], windows: Mapping[str, Any], ranks: Team
) -> dict[str, Any]:
    scoring = Scoring(model, floats, int(job.get("batch_tokens", 4096)))
    own = scoring.windows(windows, job.get("divergence_tokens"))[ranks.share]
    scores = scoring.score(len(windows["input_ids"]), own, Reporter())
    assert ranks.folder is not None
    path = ranks.folder / f"scores.{ranks.rank}.safetensors"
    write_safetensors(path, scores.tensors())
    return {"scores": str(path), "parts": scores.sums()}


def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job, see the module's description.

    Raises:
        JobError: a model, its windows or `layer_errors` is refused.
    """
    import torch

    try:
        with team(__spec__.name, job, Path(job["output"]).parent) as ranks, torch.inference_mode():
            device = ranks.device(prepare(job))
            model = StreamedModel(Path(job["checkpoint"]), device)
            floats = StreamedModel(Path(job["baseline"]), device) if job.get("baseline") else None
            return evaluate(model, floats, job, report, ranks)
    except UserError as error:
        raise JobError(str(error)) from error


if __name__ == "__main__":
    worker_main(run)
