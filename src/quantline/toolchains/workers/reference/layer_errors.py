"""Measures how far each quantized linear is from the float one, in weights and outputs, in the `reference` toolchain.

The float model is run over calibration samples. Each called linear, plain or one expert's slice of a stacked tensor, is
identified by the memory address of its weight. Its input X gives the output error ||X(W'-W)^T|| / ||X W^T||, where W' is the
dequantized weight. The inputs are the float model's, so each error is the linear's own. If a quantizer also rounds
activations, only the weights are measured.

Besides the float model, memory holds the weights of one linear at a time. Every batch dequantizes every linear again, so
samples of more than `_BATCH_TOKENS` tokens in total take disproportionately longer.

Job: model and checkpoint (folders of the float and the quantized model), calibration (safetensors: input_ids int32
(n, length)), linears (names), samples (number of the n samples to measure errors on), unfold (true, false, or null: if a
norm differs, see `folds`), device, threads. Result: `rows`, one per linear in the job's order, with

    name
    tokens              int, calibration tokens that reach it in the float model; None if its calls cannot be observed
    output_error        float, None if no token of the samples reached it
    weight_error        float, ||W'-W|| / ||W||
    weight_error_max    float, largest |W'-W|
    weight_error_mean   float, mean |W'-W|

and `tokens` (of all calibration samples), `sample_tokens`, `unfolded`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import Checkpoint, dequantized, quantization_of, quantized_layers
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.reference.engine import load_model, prepare
from quantline.toolchains.workers.reference.folded_scales import folds, unfold
from quantline.toolchains.workers.reference.linear_locations import Linear, WeightLocation, locate, mark_unseen

if TYPE_CHECKING:
    from torch import Tensor

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
# Rows of logits computed at a time if the output layer is quantized.
_HEAD_ROWS = 512


class _Errors:
    """Differences of the quantized weights; caches the last one."""

    def __init__(self, checkpoint: Checkpoint, report: Reporter, total: int, unfolded: bool) -> None:
        info = quantization_of(checkpoint.folder)
        if info is None:
            raise JobError(f"{checkpoint.folder}: is not quantized")
        self._checkpoint, self._info, self._report, self._total = checkpoint, info, report, total
        self._layers = quantized_layers(checkpoint, info)
        self._unfolded = unfolded
        self._done: set[str] = set()
        self._last: tuple[str, Any] | None = None

    def difference(self, linear: Linear) -> Tensor:
        """W' - W, float32 (out, in) on the model's device. The first call for a linear also sets its statistics."""
        import torch

        if self._last and self._last[0] == linear.name:
            return self._last[1]
        self._last = None
        if linear.name not in self._layers:
            raise JobError(f"{self._checkpoint.folder}: {linear.name} is not quantized")
        weight = linear.weight.cpu().numpy()
        values = dequantized(self._checkpoint, self._info, linear.name, self._layers[linear.name])
        if values.shape != weight.shape:
            raise JobError(f"{linear.name}: has shape {values.shape} quantized, but {weight.shape} in the float model")
        if self._unfolded:
            values = unfold(values, weight)
        difference = torch.from_numpy(np.ascontiguousarray(values - weight)).to(linear.weight.device)
        if linear.name not in self._done:
            self._done.add(linear.name)
            sizes = difference.abs()
            linear.statistics = {
                "weight_error": _relative(_square(difference), _square(linear.weight)),
                "weight_error_max": float(sizes.max()),
                "weight_error_mean": float(sizes.mean()),
            }
            self._report(len(self._done), self._total, linear.name)
        self._last = linear.name, difference
        return difference

    def add(self, linear: Linear, inputs: Tensor, outputs: Tensor) -> None:
        """Add one call: inputs (tokens, in), the float linear's outputs without bias (tokens, out)."""
        linear.error += _square(inputs @ self.difference(linear).T)
        linear.energy += _square(outputs)


def _square(values: Tensor) -> float:
    """Sum of squares of a matrix, each row's in float32; all in float64 would take several times as long."""
    import torch

    return float(torch.linalg.vector_norm(values, dim=1).double().square().sum())


def _relative(error: float, energy: float) -> float:
    if energy > 0:
        return float(np.sqrt(error / energy))
    return 0.0 if error == 0 else float("inf")


def _observer(places: Mapping[int, WeightLocation], errors: _Errors | None) -> Any:
    """A context that counts every matrix product with a known weight and, with `errors`, compares its output."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Observer(TorchFunctionMode):  # type: ignore[misc]  # the type checker does not have torch
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.linear:
                self.called(result, *args, **(kwargs or {}))
            return result

        def called(self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
            place = places.get(weight.data_ptr())
            if place is None or place.shape != tuple(weight.shape) or not input.numel():
                return
            inputs = input.reshape(-1, input.shape[-1])
            outputs = (result if bias is None else result - bias).reshape(-1, result.shape[-1])
            for start, linear in place.parts:
                linear.tokens += len(inputs)
                if errors is not None:
                    errors.add(linear, inputs, outputs[:, start : start + len(linear.weight)])

    return Observer()


def _pass(model: Any, tokens: NDArray[np.int32], places: Mapping[int, WeightLocation], errors: _Errors | None) -> None:
    """Run the model over samples, int32 (n, length); run the output layer only if it is in `places`."""
    import torch

    rows = max(1, _BATCH_TOKENS["cuda" if model.device.type == "cuda" else "cpu"] // tokens.shape[1])
    head = model.get_output_embeddings()
    with _observer(places, errors):
        for start in range(0, len(tokens), rows):
            ids = torch.from_numpy(tokens[start : start + rows].astype(np.int64)).to(model.device)
            answer = model.base_model(input_ids=ids, use_cache=False)
            if head is not None and head.weight.data_ptr() in places and hasattr(answer, "last_hidden_state"):
                states = answer.last_hidden_state.flatten(0, 1)
                for first in range(0, len(states), _HEAD_ROWS):
                    head(states[first : first + _HEAD_ROWS])


def measure(model: Any, job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job on the loaded float model, see the module's description.

    Raises:
        JobError: a linear is missing, not quantized or has another shape, or the calibration has no samples.
    """
    floats, checkpoint = Checkpoint.open(job["model"]), Checkpoint.open(job["checkpoint"])
    tokens = _samples(job["calibration"], model.get_input_embeddings().weight.shape[0])
    unfolded = folds(floats, checkpoint) if job.get("unfold") is None else bool(job["unfold"])
    if hasattr(model, "set_experts_implementation"):
        # The eager implementation calls every expert separately, so that its tokens can be counted.
        model.set_experts_implementation("eager")
    linears, places = locate(model, floats, job["linears"])
    errors = _Errors(checkpoint, report, len(linears), unfolded)
    chosen, rest = tokens[: job["samples"]], tokens[job["samples"] :]
    _pass(model, chosen, places, errors)
    reached = {linear.name for linear in linears if linear.tokens}
    if any(linear.tokens != chosen.size for linear in linears if linear.seen):
        _pass(model, rest, places, None)
    else:  # every linear gets every token
        for linear in linears:
            linear.tokens = tokens.size
    mark_unseen(linears)
    rows = []
    for linear in linears:
        if not linear.statistics:  # no token of the samples reached it
            errors.difference(linear)
        error = _relative(linear.error, linear.energy) if linear.name in reached else None
        seen = linear.tokens if linear.seen else None
        rows.append({"name": linear.name, "tokens": seen, "output_error": error, **linear.statistics})
    return {"rows": rows, "tokens": tokens.size, "sample_tokens": chosen.size, "unfolded": unfolded}


def _samples(path: str, vocabulary: int) -> NDArray[np.int32]:
    from safetensors.numpy import load_file

    tokens = load_file(path)["input_ids"]
    if tokens.ndim != 2 or not tokens.size:
        raise JobError(f"{path}: input_ids have shape {tokens.shape}, not (samples, tokens)")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise JobError(
            f"{path}: token ids are in [{tokens.min()}, {tokens.max()}], but the model knows {vocabulary}: "
            "they were made with another model's tokenizer"
        )
    return np.asarray(tokens, np.int32)


def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job, see the module's description. The result also has `load_seconds` and `pass_seconds`.

    Raises:
        JobError: `load_model` or `measure` refuses.
    """
    import torch

    device = prepare(job)
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            model = load_model(Path(job["model"]), device)
            loaded = time.perf_counter()
            result = measure(model, job, report)
    except UserError as error:
        raise JobError(str(error)) from error
    return {**result, "load_seconds": loaded - started, "pass_seconds": time.perf_counter() - loaded}


def imports() -> None:
    """Import what `run` needs, including a typical decoder's modules; loads no model."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    # Importing `transformers.models.qwen2` alone would not load its modules.
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401


if __name__ == "__main__":
    worker_main(run, imports)
