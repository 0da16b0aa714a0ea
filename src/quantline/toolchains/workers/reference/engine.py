"""The reference engine: loads any known checkpoint as a plain float32 transformers model, in the `reference` toolchain.

Quantized linears are dequantized exactly, `w = (u - z) * s`, and the model uses plain matrix products. No quantized kernel
is involved, so only the weights are measured, on any device. If the checkpoint also rounds activations (W8A8), the inputs of
its linears are rounded as a server does it, per token. Every tensor of the checkpoint must match a parameter of the model,
and every parameter a tensor; otherwise an error names them.

Jobs, by `kind` (paths are strings; `device` is "cpu" or "cuda", `threads` the number of CPU threads):

`probe`     checkpoint, input_ids (list of equally long lists, or a safetensors file with `input_ids` (n, t)), output.
            Writes `input_ids` int32 (n, t) and `logits` float32 (n, t, vocabulary).
`score`     checkpoint, windows (safetensors: `input_ids` int32 (tokens,), `offsets` int64 (windows + 1,)), output,
            batch_tokens. Writes `logprobs` float32 (tokens,), the natural logarithm of each token's probability given
            the tokens before it in its window, NaN at the first; and `top1` int32 (tokens,), the most likely token at
            that position, -1 at the first.
`generate`  checkpoint, prompts (lists of token ids), max_new_tokens, stop_ids (default: none, never stops early).
            Returns `tokens`, the greedy continuations (a stop token comes last), and `margins`, how far each token's
            log-probability is above the runner-up's: if that is tiny, engines may differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import (
    Checkpoint,
    iter_dequantized,
    quantization_of,
    quantized_layers,
    write_safetensors,
)
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.reference.accounting import config_of, said, unaccounted

# Float32 values of one batch of logits: 1 GiB, unless a single window needs more.
_MAX_LOGITS = 2**28
# Rows of logits normalised at a time, so that float32 temporaries stay small compared with the logits.
_ROWS = 512


def attention_of(config: Any) -> str:
    """The implementation of attention for a loaded transformers config: "sdpa", or "eager" where that is not right.

    33 of the 178 causal classes of transformers 5.19 have no SDPA (BLOOM, GPT-Neo, gpt-oss), which the class says. Where
    scores are capped (Gemma 2's `attn_logit_softcapping`), SDPA silently ignores the cap (5.19, 4.52). What a config.json
    names itself, such as flash attention, is overridden.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def load_model(folder: Path, device: str = "cpu") -> Any:
    """Build the transformers model of a checkpoint folder: float32, eval mode, no remote code.

    Attention is as `attention_of` says. A head tied to the embeddings may
    be absent. All-zero biases that a quantizer added to linears without a bias are dropped.

    Raises:
        JobError: transformers does not know the architecture; the checkpoint is damaged; tensors are missing, left
            over or have another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        checkpoint, info = Checkpoint.open(folder), quantization_of(folder)
        quantized = quantized_layers(checkpoint, info)
        # `iter_dequantized` may yield read-only views of the file.
        state = {
            name: torch.from_numpy(np.require(array, requirements=["C", "W"]))
            for name, array in iter_dequantized(folder)
        }
    except UserError as error:
        raise JobError(str(error)) from error
    config = config_of(folder)
    try:
        with torch.device("meta"):
            attention = attention_of(config)
            skeleton = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, attn_implementation=attention
            )  # fmt: skip
    except Exception as error:  # a value of config.json that the model does not expect raises anything
        raise JobError(
            f"{folder}: transformers cannot build the model that its config.json describes: {said(error)}"
        ) from error
    try:
        # Without a path, transformers loads the given tensors as it would load a file's, with renaming and fusing.
        # Buffers that are not in a checkpoint (rotary frequencies) are computed, not left empty.
        model, loaded = type(skeleton).from_pretrained(
            None, config=skeleton.config, state_dict=dict(state), dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise JobError(f"{folder}: transformers cannot build its model: {error}") from error
    _account(folder, model, loaded, state, quantized)
    if info is not None and info.activation_bits is not None:
        _round_activations(folder, model, quantized, info.activation_bits)
    return model.to(device).eval()


def _round_activations(folder: Path, model: Any, layers: Iterable[str], bits: int) -> None:
    """Round the inputs of linears: symmetric, one scale per token, its largest magnitude over 2**(bits-1) - 1."""
    limit = 2 ** (bits - 1) - 1

    def rounded(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        values = arguments[0]  # (..., in)
        scale = values.abs().amax(dim=-1, keepdim=True) / limit
        # An all-zero token stays zero.
        return ((values / scale.clamp(min=1e-30)).round() * scale, *arguments[1:])

    for name in layers:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise JobError(
                f"{folder}: {name} is not a separate module here, so its activations cannot be rounded"
            ) from None
        module.register_forward_pre_hook(rounded)


def _account(
    folder: Path, model: Any, loaded: Mapping[str, Any], state: Mapping[str, Any], quantized: Mapping[str, Any]
) -> None:
    import torch

    invented = {f"{layer}.bias" for layer in quantized}
    zeros = {name for name in invented & set(state) if not state[name].count_nonzero().item()}
    faults = unaccounted(loaded, zeros)
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight):
        # transformers would load the head from the file, but a server might not.
        faults.append("has a head of its own, but config.json ties it to the embeddings (tie_word_embeddings)")
    if faults:
        raise JobError(f"{folder}: {'; '.join(faults)}; does config.json belong to these weights?")


def plan_batches(offsets: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Group windows of equal length, so that nothing is padded. Returns lists of window numbers, longest windows first.

    Windows of fewer than two tokens predict nothing and are left out.

    Args:
        offsets: int64 (windows + 1,).
        batch_tokens: upper limit of tokens in a batch; a longer window is a batch of its own.
    """
    lengths = np.diff(offsets)
    batches: list[NDArray[np.int64]] = []
    for length in sorted(set(lengths[lengths > 1].tolist()), reverse=True):
        members = np.flatnonzero(lengths == length)
        rows = max(1, batch_tokens // length)
        batches.extend(members[start : start + rows] for start in range(0, len(members), rows))
    return batches


def score_windows(
    model: Any,
    input_ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    batch_tokens: int,
    report: Reporter,
    *,
    beside: Callable[[Any, Any], Any] | None = None,
    beside_tokens: int | None = None,
) -> dict[str, NDArray[Any]]:
    """What is kept per position of every window, by name; `evaluate` reads it by these names from the stage's output.

    Args:
        input_ids: int32 (tokens,), all windows one after another.
        offsets: int64 (windows + 1,), the start of each; the last entry is the number of tokens.
        batch_tokens: upper limit of tokens computed at once.
        beside: computes one more value per position, from a batch's ids (rows, length) and logits (rows * length,
            vocabulary). It may hold as many logits again.
        beside_tokens: compute `beside` for about this many tokens, in batches spread over all; None means all tokens.

    Returns:
        logprobs float32 (tokens,) in nats, NaN at the start of a window; top1, the most likely token, int32 (tokens,), -1
        there; and with `beside` kl, its values, float32 (tokens,), NaN at the start of a window and where not computed.
    """
    import torch

    kept: dict[str, NDArray[Any]] = {
        "logprobs": np.full(len(input_ids), np.nan, dtype=np.float32),
        "top1": np.full(len(input_ids), -1, dtype=np.int32),
    }
    if beside is not None:
        kept["kl"] = np.full(len(input_ids), np.nan, dtype=np.float32)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    room = _MAX_LOGITS // vocabulary // (1 if beside is None else 2)
    batches = plan_batches(offsets, min(batch_tokens, room))
    total = sum(int((offsets[batch + 1] - offsets[batch]).sum()) for batch in batches)
    done = 0
    share = 1.0 if beside_tokens is None else min(1.0, beside_tokens / max(total, 1))
    for number, batch in enumerate(batches):
        length = int(offsets[batch[0] + 1] - offsets[batch[0]])
        places = offsets[batch][:, None] + np.arange(length)  # (rows, length)
        ids = torch.from_numpy(input_ids[places].astype(np.int64)).to(model.device)
        # The last position predicts a token outside the window, so it is not computed.
        answer = model(input_ids=ids[:, :-1], use_cache=False)
        logits = answer.logits.float().flatten(0, 1)  # (rows * (length - 1), vocabulary)
        targets = ids[:, 1:].reshape(-1)
        chosen = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            picked = logits[rows].gather(1, targets[rows, None]).squeeze(1)
            chosen[rows] = picked - logits[rows].logsumexp(dim=1)
        scored = places[:, 1:].reshape(-1)
        kept["logprobs"][scored] = chosen.cpu().numpy()
        kept["top1"][scored] = logits.argmax(dim=1).cpu().numpy()
        # The first batch is always included, so that a text of one batch has values.
        if beside is not None and math.ceil((number + 1) * share) > math.ceil(number * share):
            kept["kl"][scored] = beside(ids[:, :-1], logits).cpu().numpy()
        done += len(batch) * length
        report(done, total, "tokens")
    return kept


def score(
    model: Any, job: Mapping[str, Any], report: Reporter, beside: Callable[[Any, Any], Any] | None = None
) -> dict[str, Any]:
    """Run a `score` job. With `beside`, its values for the job's `divergence_tokens` are written as `kl`.

    Raises:
        JobError: token ids are outside the vocabulary, or log-probabilities are NaN.
    """
    from safetensors.numpy import load_file

    windows = load_file(job["windows"])
    input_ids, offsets = windows["input_ids"], windows["offsets"]
    check_ids(model, input_ids)
    started = time.perf_counter()
    batch_tokens = int(job.get("batch_tokens", 4096))
    kept = score_windows(
        model, input_ids, offsets, batch_tokens, report, beside=beside, beside_tokens=job.get("divergence_tokens")
    )
    seconds = time.perf_counter() - started
    lost = int(np.isnan(kept["logprobs"]).sum()) - int((np.diff(offsets) > 0).sum())
    if lost:
        raise JobError(f"{job['checkpoint']}: {lost} log-probabilities are NaN; the weights overflow in float32")
    write_safetensors(Path(job["output"]), kept)
    return {"tokens": len(input_ids), "scoring_seconds": seconds, "tokens_per_second": len(input_ids) / seconds}


def _probe(model: Any, job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    import torch
    from safetensors.numpy import load_file

    given = job["input_ids"]
    try:
        input_ids = np.array(load_file(given)["input_ids"] if isinstance(given, str) else given, dtype=np.int32)
    except ValueError as error:
        raise JobError(f"probe: input_ids are not equally long lists of token ids ({error})") from error
    if input_ids.ndim != 2 or not input_ids.size:
        raise JobError(f"probe: input_ids have shape {input_ids.shape}, not (sequences, tokens)")
    check_ids(model, input_ids)
    logits = []
    for number, row in enumerate(input_ids, start=1):
        ids = torch.from_numpy(row.astype(np.int64))[None].to(model.device)
        logits.append(model(input_ids=ids, use_cache=False).logits.float().cpu().numpy())
        report(number, len(input_ids), "sequences")
    stacked = np.concatenate(logits)  # (n, t, vocabulary)
    if not stacked.max() < np.inf:  # NaN is not smaller either; a model may mask tokens by -inf
        raise JobError(
            f"{job['checkpoint']}: its logits are NaN or infinite in float32; take weights that work elsewhere"
        )
    write_safetensors(Path(job["output"]), {"input_ids": input_ids, "logits": stacked})
    return {"sequences": input_ids.shape[0], "tokens": input_ids.size, "vocabulary": stacked.shape[2]}


def _generate(model: Any, job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    import torch

    stops = set(job.get("stop_ids") or ())
    tokens: list[list[int]] = []
    margins: list[list[float]] = []
    for number, prompt in enumerate(job["prompts"], start=1):
        if not prompt:
            raise JobError(f"generate: prompt {number} has no tokens")
        check_ids(model, np.array(prompt))
        # Not `generate`, because it would apply the checkpoint's generation settings.
        ids, past = torch.tensor([prompt], device=model.device), None
        tokens.append([])
        margins.append([])
        for _ in range(int(job["max_new_tokens"])):
            answer = model(input_ids=ids, past_key_values=past, use_cache=True)
            best = answer.logits[0, -1].float().topk(2)
            token, past = int(best.indices[0]), answer.past_key_values
            tokens[-1].append(token)
            margins[-1].append(float(best.values[0] - best.values[1]))
            if token in stops:
                break
            ids = torch.tensor([[token]], device=model.device)
        report(number, len(job["prompts"]), "prompts")
    return {"tokens": tokens, "margins": margins}


def check_ids(model: Any, ids: NDArray[Any]) -> None:
    """Refuse token ids outside the model's vocabulary.

    Raises:
        JobError: an id is outside the vocabulary.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        raise JobError(
            f"token ids are in [{ids.min()}, {ids.max()}], but the model knows {size}: "
            "they were made with another model's tokenizer"
        )


_KINDS: dict[str, Callable[[Any, Mapping[str, Any], Reporter], dict[str, Any]]] = {
    "probe": _probe,
    "score": score,
    "generate": _generate,
}


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


def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job, see the module's description. The result also has `load_seconds` and `parameters`.

    Raises:
        JobError: the kind is unknown, the device is missing, or `load_model` or the job refuses.
    """
    import torch

    if job.get("kind") not in _KINDS:
        raise JobError(f"kind={job.get('kind')!r}: the reference engine knows {', '.join(_KINDS)}")
    device = prepare(job)
    started = time.perf_counter()
    with torch.inference_mode():
        model = load_model(Path(job["checkpoint"]), device)
        load_seconds = time.perf_counter() - started
        result = _KINDS[job["kind"]](model, job, report)
    parameters = sum(math.prod(parameter.shape) for parameter in model.parameters())
    return {**result, "load_seconds": load_seconds, "parameters": parameters}


if __name__ == "__main__":
    worker_main(run)
