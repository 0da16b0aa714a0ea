"""Perplexity, the comparison with the float model, and the agreement of the two engines.

Two engines score the same windows (`quantline.data.windows`): `reference` computes with dequantized weights and without
quantized kernels; `vllm` is the server. The reference engine's scores of the variant are compared with those of the float
baseline on the same documents. The two engines' scores of the variant are compared as well, and a difference above a
tolerance is a failure. All log-probabilities are natural logarithms, and losses are sums of `-log p` in nats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.model_files import WEIGHTS
from quantline.config.evaluate import BootstrapConfig
from quantline.core.errors import QuantlineError, UserError
from quantline.core.files import replaced
from quantline.core.text import percent
from quantline.data.windows import Windows
from quantline.evaluation import nats
from quantline.evaluation.bootstrap import paired_bootstrap


@dataclass(frozen=True)
class DocumentScore:
    """A document under one model: the sum of `-log p` over its scored tokens, in nats, and their number."""

    id: str
    nll_sum: float
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline on the same documents.

    Attributes:
        perplexity, baseline_perplexity: of all tokens.
        difference, ratio: of the two perplexities, variant minus (over) baseline.
        nll_difference: nats per token, variant minus baseline; the logarithm of `ratio`.
        low, high: confidence interval of `nll_difference`.
        verdict: "worse" or "better" if the interval does not contain zero, else "same": this text shows no difference.
    """

    perplexity: float
    baseline_perplexity: float
    difference: float
    ratio: float
    nll_difference: float
    low: float
    high: float
    verdict: Literal["better", "same", "worse"]


def document_nlls(windows: Windows, logprobs: NDArray[Any]) -> list[DocumentScore]:
    """Sum an engine's log-probabilities over each document's scored tokens.

    Args:
        logprobs: floating point (tokens,), aligned with `windows.input_ids`; only scored positions are read.

    Returns:
        One score for each of `windows.document_ids`, in their order; summed in float64.

    Raises:
        QuantlineError: the number of tokens differs, or a log-probability is invalid (NaN, infinite, above 0).
    """
    if logprobs.shape != windows.input_ids.shape:
        raise QuantlineError(
            f"log-probabilities of shape {logprobs.shape} for {len(windows.input_ids)} tokens: they belong to other windows"
        )
    scored = windows.scored
    values = logprobs[scored].astype(np.float64)
    # The log-probability of a certain token can be a rounding error above 0.
    wrong = int((~np.isfinite(values) | (values > 1e-3)).sum())
    if wrong:
        raise QuantlineError(
            f"{wrong} of {len(values)} scored tokens have no valid log-probability: the scores are damaged"
        )
    sums, tokens = document_sums(windows, -logprobs)
    return [
        DocumentScore(name, float(nll), int(number))
        for name, nll, number in zip(windows.document_ids, sums, tokens, strict=True)
    ]


def document_sums(
    windows: Windows, values: NDArray[Any], only: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of values (tokens,) over each document's scored tokens, and their number; float64 (documents,) each.

    only: bool (tokens,); only these tokens count.
    """
    scored = windows.scored if only is None else windows.scored & only
    owner = np.repeat(windows.document, np.diff(windows.offsets))[scored]
    count = len(windows.document_ids)
    sums: NDArray[np.float64] = np.bincount(owner, values[scored].astype(np.float64), minlength=count).astype(
        np.float64
    )
    return sums, np.bincount(owner, minlength=count).astype(np.float64)


def in_words(scores: Sequence[DocumentScore], windows: Windows) -> list[DocumentScore]:
    """The same losses with word counts, for a protocol of level "word".

    Raises:
        UserError: the windows' text is unknown.
    """
    if windows.words is None:
        raise UserError("evaluate.level=word: the text of these windows is unknown; set evaluate.level=token")
    return [replace(score, tokens=int(words)) for score, words in zip(scores, windows.words, strict=True)]


def perplexity(scores: Iterable[DocumentScore]) -> float:
    """`exp(sum of nll / sum of tokens)`: every token counts the same. Infinite beyond the range of a float."""
    return nats.exp(_mean_nll(scores))


def _mean_nll(scores: Iterable[DocumentScore]) -> float:
    listed = list(scores)
    tokens = sum(score.tokens for score in listed)
    if not tokens:
        raise UserError("no token was scored; give more text")
    return math.fsum(score.nll_sum for score in listed) / tokens


def compare(
    scores: Sequence[DocumentScore],
    baseline_scores: Sequence[DocumentScore],
    how: BootstrapConfig,
) -> Comparison:
    """Compare a variant with the baseline, document by document; see `bootstrap.paired_bootstrap`.

    Raises:
        UserError: the scores are not of the same documents and tokens, or of fewer than two documents.
    """
    _same_documents(scores, baseline_scores)
    values, baseline, tokens = (
        np.array(column, dtype=np.float64)
        for column in (
            [score.nll_sum for score in scores],
            [score.nll_sum for score in baseline_scores],
            [score.tokens for score in scores],
        )
    )
    interval = paired_bootstrap(values, baseline, tokens, how)
    own, other = perplexity(scores), perplexity(baseline_scores)
    verdict: Literal["better", "same", "worse"] = "same"
    if interval.low > 0:
        verdict = "worse"
    elif interval.high < 0:
        verdict = "better"
    return Comparison(
        perplexity=own,
        baseline_perplexity=other,
        difference=own - other,
        ratio=nats.exp(interval.estimate),
        nll_difference=interval.estimate,
        low=interval.low,
        high=interval.high,
        verdict=verdict,
    )


def _same_documents(scores: Sequence[DocumentScore], others: Sequence[DocumentScore]) -> None:
    if [(score.id, score.tokens) for score in scores] != [(other.id, other.tokens) for other in others]:
        raise UserError(
            "the two evaluations are not of the same documents and tokens; repeat both with the same text and protocol"
        )


def relative_difference(scores: Sequence[DocumentScore], others: Sequence[DocumentScore]) -> float:
    """`perplexity(others) / perplexity(scores) - 1`, signed. Between two engines: the effect of kernels and dtype.

    Raises:
        UserError: the scores are not of the same documents and tokens.
    """
    _same_documents(scores, others)
    return nats.growth(_mean_nll(others) - _mean_nll(scores))


def check_engines(difference: float, tolerance: float) -> None:
    """Fail if the `relative_difference` of the two engines exceeds its limit.

    Raises:
        QuantlineError: the engines differ by more than `tolerance`.
    """
    if not abs(difference) <= tolerance:
        raise QuantlineError(
            f"the server's perplexity differs from the reference engine's by {percent(difference, 2, sign=True)}; "
            f"allowed is {percent(tolerance, 2)} (evaluate.engine_tolerance). The server computes something else than was "
            "quantized: check the kernel, the serving dtype and how the server reads the config"
        )


def top1_matches(
    windows: Windows, top1: NDArray[np.int32], baseline_top1: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scored positions where variant and baseline have the same likeliest token, by document; and all scored positions.

    Args:
        top1, baseline_top1: int32 (tokens,).

    Returns:
        float64 (documents,) each.

    Raises:
        UserError: the arrays do not belong to these windows.
    """
    if not top1.shape == baseline_top1.shape == windows.input_ids.shape:
        raise UserError("the likeliest tokens of variant and baseline are not of the same windows; evaluate both again")
    return document_sums(windows, top1 == baseline_top1)


def load_scores(path: Path) -> dict[str, NDArray[Any]]:
    """What the reference engine kept per position: `logprobs`, `top1` and others, see its `Scores`.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, NDArray[Any]] = load_file(path)
        if missing := {"logprobs", "top1"} - set(tensors):
            raise KeyError(*missing)
        return tensors
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: scores cannot be read ({error}); evaluate again") from error


def load_server_scores(folder: Path, windows: Windows) -> NDArray[np.float32] | None:
    """The server's log-probabilities, float32 (tokens,), from an output of serve_smoke; None if it did not serve.

    Raises:
        UserError: they belong to other windows, or are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / "scores.json").exists():
        return None
    try:
        sha256 = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["windows_sha256"]
        logprobs: NDArray[np.float32] = load_file(folder / "scores.safetensors")["logprobs"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: scores cannot be read ({error}); run serve_smoke again") from error
    if sha256 != windows.sha256:
        raise UserError(f"{folder}: scored other windows than this evaluation's; run serve_smoke again")
    return logprobs


def weight_bytes(checkpoint: Path) -> int:
    """Bytes of a checkpoint's weight files on disk.

    Raises:
        UserError: the folder has none.
    """
    sizes = [path.stat().st_size for path in checkpoint.iterdir() if path.suffix in WEIGHTS]
    if not sizes:
        raise UserError(f"{checkpoint}: has no weights (*{', *'.join(WEIGHTS)})")
    return sum(sizes)


def evaluation_metrics(
    *,
    reference: Sequence[DocumentScore],
    comparison: Comparison,
    size_bytes: int,
    float_size_bytes: int,
    vllm: Sequence[DocumentScore] | None = None,
    windows: Windows | None = None,
) -> dict[str, float]:
    """All results of an evaluation under their published names, without those that were not measured.

    Args:
        reference, vllm: the variant's scores by either engine.
        comparison: the reference engine's scores compared with the baseline's.
        size_bytes, float_size_bytes: size of the weight files of the variant and of the float model.
        windows: the scored windows; if their text is known, perplexity per word and bits per byte are added.
    """
    metrics: dict[str, float] = {
        "reference_perplexity": perplexity(reference),
        "reference_nll": _mean_nll(reference),
        "perplexity_difference": comparison.difference,
        "perplexity_ratio": comparison.ratio,
        "nll_difference": comparison.nll_difference,
        "nll_difference_low": comparison.low,
        "nll_difference_high": comparison.high,
        "size_bytes": size_bytes,
        "float_size_bytes": float_size_bytes,
        "compression_ratio": float_size_bytes / size_bytes,
        "tokens_scored": sum(score.tokens for score in reference),
        "documents": len(reference),
    }
    if vllm is not None:
        metrics["vllm_perplexity"] = perplexity(vllm)
        metrics["vllm_nll"] = _mean_nll(vllm)
        metrics["engine_relative_difference"] = relative_difference(reference, vllm)
    if windows is not None and windows.words is not None and windows.text_bytes is not None:
        nll = math.fsum(score.nll_sum for score in reference)
        words, size = int(windows.words.sum()), int(windows.text_bytes.sum())
        if words and size:
            metrics.update(words_scored=words, bytes_scored=size, bits_per_byte=nll / math.log(2) / size)
            metrics["word_perplexity"] = nats.exp(nll / words)
    return metrics


def write_documents(path: Path, reference: Sequence[DocumentScore], vllm: Sequence[DocumentScore] | None) -> None:
    """Write a JSON line for every document, atomically: id, tokens, nll_reference, nll_vllm (or null).

    Losses are sums in nats, written with all their digits; equal scores give equal bytes.

    Raises:
        UserError: the scores are not of the same documents and tokens.
    """
    if vllm is not None:
        _same_documents(reference, vllm)
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, score in enumerate(reference):
            row = {"id": score.id, "tokens": score.tokens, "nll_reference": score.nll_sum}
            row["nll_vllm"] = vllm[number].nll_sum if vllm is not None else None
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_documents(path: Path) -> tuple[list[DocumentScore], list[DocumentScore] | None]:
    """Read the output of `write_documents`: the reference engine's scores, and vLLM's or None.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        reference = [DocumentScore(row["id"], row["nll_reference"], row["tokens"]) for row in rows]
        vllm = [DocumentScore(row["id"], row["nll_vllm"], row["tokens"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: document scores cannot be read ({error}); evaluate again") from error
    return reference, None if any(score.nll_sum is None for score in vllm) else vllm
