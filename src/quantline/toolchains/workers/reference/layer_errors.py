"""Measures how far each quantized linear is from the float one, in weights and outputs, in the `reference` toolchain.

The float model is run over calibration samples, part by part. Each called linear, plain or one expert's slice of a stacked
tensor, is identified by the memory address of its weight. Its input X gives the output error ||X(W'-W)^T|| / ||X W^T||,
where W' is the dequantized weight. The inputs are the float model's, so each error is the linear's own. If a quantizer also
rounds activations, only the weights are measured.

With `rounding`, further samples that the quantizer did not see (`held_ids`) give each linear's error again, and that of its
weights rounded to nearest in the same grid.

Memory holds a layer of the float model and the differences W'-W of the same layer.

Job: model and checkpoint (folders of the float and the quantized model), calibration (safetensors: input_ids int32
(n, length)), linears (names), samples (number of the n samples to measure errors on), unfold (true, false, or null: if a
norm differs, see `folds`), rounding (compare with rounding to nearest), device, threads. Result: `rows`, one per linear:

    name
    tokens              int, calibration tokens that reach it in the float model; None if its calls cannot be observed
    output_error        float, None if no token of the samples reached it
    weight_error        float, ||W'-W|| / ||W||
    weight_error_max    float, largest |W'-W|
    weight_error_mean   float, mean |W'-W|
    held_error          float, as output_error, on the samples that were held back; None without them
    rounding_error      float, the same of the weights rounded to nearest; None without them

and `tokens` (of all calibration samples), `sample_tokens`, `unfolded`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.float_view import FloatView
from quantline.checkpoints.linears import place_of
from quantline.checkpoints.model_parts import MOST_LOGITS
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.reference.engine import measuring
from quantline.toolchains.workers.reference.folded_scales import folds, unfold
from quantline.toolchains.workers.reference.linear_locations import (
    EXPERT,
    Linear,
    WeightLocation,
    locate,
    mark_unseen,
)
from quantline.toolchains.workers.reference.nearest import rounded
from quantline.toolchains.workers.reference.skeleton import REST
from quantline.toolchains.workers.reference.streaming import Batch, StreamedModel

if TYPE_CHECKING:
    from torch import Tensor

HELD = "held_ids"  # the tensor of samples that were held back
_READERS = 4
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


class _Errors:
    """Differences of the quantized weights; keeps those of the layer at hand."""

    def __init__(self, checkpoint: FloatView, report: Reporter, total: int, unfolded: bool) -> None:
        if checkpoint.info is None:
            raise JobError(f"{checkpoint.checkpoint.folder}: is not quantized")
        self._checkpoint, self._report, self._total, self._unfolded = checkpoint, report, total, unfolded
        self._done = 0
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read linears")
        self._values: dict[str, Future[NDArray[np.float32]]] = {}
        self._differences: dict[str, Tensor] = {}
        self._rounded: dict[str, Tensor] = {}

    def difference(self, linear: Linear) -> Tensor:
        """W' - W, float32 (out, in) on the model's device. The first call for a linear also sets its statistics."""
        import torch

        if linear.name in self._differences:
            return self._differences[linear.name]
        if linear.name not in self._checkpoint.quantized:
            raise JobError(f"{self._checkpoint.checkpoint.folder}: {linear.name} is not quantized")
        assert linear.weight is not None, "the part of the linear is filled"
        weight = linear.weight
        expected = self._values.pop(linear.name, None)
        values = self._checkpoint.values(f"{linear.name}.weight") if expected is None else expected.result()
        if values.shape != tuple(weight.shape):
            raise JobError(
                f"{linear.name}: has shape {values.shape} quantized, but {tuple(weight.shape)} in the float model"
            )
        if self._unfolded:
            values = unfold(values, weight.cpu().numpy())
        difference = torch.from_numpy(np.ascontiguousarray(values)).to(weight.device) - weight
        self._differences[linear.name] = difference
        if linear.statistics:  # layers share it
            return difference
        sizes = difference.abs()
        linear.statistics = {
            "weight_error": _relative(_square(difference), _square(weight)),
            "weight_error_max": float(sizes.max()),
            "weight_error_mean": float(sizes.mean()),
        }
        self._done += 1
        self._report(self._done, self._total, linear.name)
        return difference

    def expect(self, linears: Iterable[Linear]) -> None:
        """Dequantize weights in the background, of linears that are quantized and not measured yet."""
        for linear in linears:
            if linear.statistics or linear.name in self._values:
                continue
            if linear.name in self._checkpoint.quantized:
                name = f"{linear.name}.weight"
                self._values[linear.name] = self._pool.submit(self._checkpoint.values, name)

    def leave(self, linears: Iterable[Linear]) -> None:
        """Measure those that no token reached, and free the memory of all; the part is filled."""
        for linear in linears:
            if not linear.statistics:
                self.difference(linear)
            linear.weight = None
        self._differences.clear()
        self._rounded.clear()

    def add(self, linear: Linear, inputs: Tensor, outputs: Tensor) -> None:
        """Add one call: inputs (tokens, in), the float linear's outputs without bias (tokens, out)."""
        linear.measured += len(inputs)
        linear.error += _square(inputs @ self.difference(linear).T)
        linear.energy += _square(outputs)

    def add_held(self, linear: Linear, inputs: Tensor, outputs: Tensor) -> None:
        """As `add`, for samples that were held back; also with the weights rounded to nearest."""
        assert linear.weight is not None
        assert self._checkpoint.info is not None
        if linear.name not in self._rounded:
            grid = self._checkpoint.info.of(linear.name)
            self._rounded[linear.name] = rounded(linear.weight, grid) - linear.weight
        linear.held += _square(inputs @ self.difference(linear).T)
        linear.rounded += _square(inputs @ self._rounded[linear.name].T)
        linear.held_energy += _square(outputs)


def _square(values: Tensor) -> float:
    """Sum of squares of a matrix, each row's in float32; all in float64 would take several times as long."""
    import torch

    return float(torch.linalg.vector_norm(values, dim=1).double().square().sum())


def _relative(error: float, energy: float) -> float:
    if energy > 0:
        return float(np.sqrt(error / energy))
    return 0.0 if error == 0 else float("inf")


class _Calls:
    """Counts every matrix product with a known weight and, with `errors`, compares its output.

    Attributes:
        places: the known weights, by memory address.
        errors: None only counts.
        held: whether what is computed was held back: it is compared, not counted.
        fresh: whether what the model computes is real, see `StreamedModel.live`.
    """

    def __init__(self, fresh: Callable[[], bool]) -> None:
        self.places: Mapping[int, WeightLocation] = {}
        self.errors: _Errors | None = None
        self.held = False
        self.fresh = fresh

    def observer(self) -> AbstractContextManager[Any]:
        """A context that observes the matrix products inside it."""
        from torch.nn.functional import linear
        from torch.overrides import TorchFunctionMode

        called = self._called

        class Observer(TorchFunctionMode):  # type: ignore[misc]  # the type checker does not have torch
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                if func is linear:
                    called(result, *args, **(kwargs or {}))
                return result

        observer: AbstractContextManager[Any] = Observer()
        return observer

    def _called(self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        place = self.places.get(weight.data_ptr()) if self.fresh() else None
        if place is None or place.shape != tuple(weight.shape) or not input.numel():
            return
        inputs = input.reshape(-1, input.shape[-1])
        outputs = (result if bias is None else result - bias).reshape(-1, result.shape[-1])
        for start, linear in place.parts:
            if self.held and self.errors is not None:
                self.errors.add_held(linear, inputs, outputs[:, start : start + linear.rows])
                continue
            linear.tokens += len(inputs)
            if self.errors is not None:
                self.errors.add(linear, inputs, outputs[:, start : start + linear.rows])


def _pass(
    model: StreamedModel, linears: Sequence[Linear], errors: _Errors, chosen: Sequence[Batch], rest: Sequence[Batch],
    *, held: Sequence[Batch] = (),
) -> None:  # fmt: skip
    """Run the model over samples: those whose errors are measured, those whose tokens are only counted, and those held back.

    The output layer is run only if it is one of the linears.
    """
    calls = _Calls(lambda: model.live)
    model.observer = calls.observer
    skeleton = model.skeleton
    homes = {linear.name: skeleton.homes(f"{linear.name}.weight") for linear in linears}
    visited: set[str] = set()

    def compute(step: Callable[[Batch], Any]) -> None:
        for batches, measured in ((chosen, errors), (rest, None), (held, errors)):
            calls.errors, calls.held = measured, batches is held
            for batch in batches:
                step(batch)

    def within(part: str) -> list[Linear]:
        """The linears of a part; of those that the model stacks or fuses, the ones of the same layer."""
        layer = place_of(f"{part}.weight")[0]
        if layer < 0 and part != model.head:
            return [linear for linear in linears if part in homes[linear.name]]
        return [
            linear for linear in linears
            if part in homes[linear.name] or (not homes[linear.name] and place_of(linear.name)[0] == layer)
        ]  # fmt: skip

    def arrive(part: str) -> list[Linear]:
        here = [linear for linear in within(part) if linear not in always]
        visited.update(linear.name for linear in here)
        calls.places = {**places, **locate(part, skeleton, here, homes)}
        return here

    try:
        always = [linear for linear in linears if REST in homes[linear.name]]
        places = locate(REST, skeleton, always, homes)
        visited.update(linear.name for linear in always)
        parts = list(skeleton.parts)
        while (part := model.next_part([*chosen, *rest][0])) is not None:
            skeleton.fill(part)
            following = parts[parts.index(part) + 1 :][:1]
            errors.expect([*within(part), *(linear for one in following for linear in within(one))])
            here = arrive(part)
            compute(model.advance)
            errors.leave(here)
            model.release()
        if always or any(model.head in home for home in homes.values()):
            skeleton.fill(model.head)
            here = arrive(model.head)
            compute(lambda batch: _each_row(model, batch))
            errors.leave([*here, *always])
            model.release()
        left = [linear for linear in linears if linear.name not in visited]  # in no part that computed
        locate(REST, skeleton, left, {linear.name: {} for linear in left})
        errors.leave(left)
    finally:
        model.observer = nullcontext


def _each_row(model: StreamedModel, batch: Batch) -> None:
    """The logits of a batch, a few sequences at a time."""
    rows = max(1, MOST_LOGITS // model.logits_width // batch.ids.shape[1])
    for part in batch.split(rows):
        model.logits(part)


def measure(model: StreamedModel, job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job on the float model, see the module's description.

    Raises:
        JobError: a linear is missing, not quantized or has another shape, or the calibration has no samples.
    """
    checkpoint = FloatView.open(job["checkpoint"])
    tokens = _samples(job["calibration"], model.vocabulary)
    held = _samples(job["calibration"], model.vocabulary, HELD) if job.get("rounding") else None
    folded = job.get("unfold")
    unfolded = folds(model.skeleton.view.checkpoint, checkpoint.checkpoint) if folded is None else bool(folded)
    linears = [Linear(name) for name in job["linears"]]
    errors = _Errors(checkpoint, report, len(linears), unfolded)
    chosen, rest = tokens[: job["samples"]], tokens[job["samples"] :]
    counted = any(EXPERT.search(linear.name) for linear in linears) or not len(chosen)
    with _separate_experts(model.model):
        further = _batches(model, held) if held is not None else []
        _pass(model, linears, errors, _batches(model, chosen), _batches(model, rest) if counted else [], held=further)
        if not counted and any(linear.tokens not in (0, chosen.size) for linear in linears):
            counted = True  # experts by other names
            _pass(model, linears, errors, [], _batches(model, rest))
    if not counted:  # every linear gets every token
        for linear in linears:
            linear.tokens = tokens.size if linear.tokens else 0
    mark_unseen(linears)
    rows = []
    for linear in linears:
        error = _relative(linear.error, linear.energy) if linear.measured else None
        seen = linear.tokens if linear.seen else None
        apart = linear.held_energy > 0
        rows.append({
            "name": linear.name, "tokens": seen, "output_error": error, **linear.statistics,
            "held_error": _relative(linear.held, linear.held_energy) if apart else None,
            "rounding_error": _relative(linear.rounded, linear.held_energy) if apart else None,
        })  # fmt: skip
    return {"rows": rows, "tokens": tokens.size, "sample_tokens": chosen.size, "unfolded": unfolded}


@contextmanager
def _separate_experts(model: Any) -> Iterator[None]:
    """Inside the block every expert is called separately, so that its tokens can be counted."""
    if not hasattr(model, "set_experts_implementation"):
        yield
        return
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _batches(model: StreamedModel, tokens: NDArray[np.int32]) -> list[Batch]:
    """Batches of samples, int32 (n, length)."""
    rows = max(1, _BATCH_TOKENS["cuda" if model.device.startswith("cuda") else "cpu"] // tokens.shape[1])
    return [model.batch(tokens[start : start + rows]) for start in range(0, len(tokens), rows)]


def _samples(path: str, vocabulary: int, key: str = "input_ids") -> NDArray[np.int32]:
    from safetensors.numpy import load_file

    found = load_file(path)
    tokens = np.asarray(found.get(key, found["input_ids"][:0]), np.int32)
    if key == HELD and not tokens.size:
        return tokens
    if tokens.ndim != 2 or not tokens.size:
        raise JobError(f"{path}: input_ids have shape {tokens.shape}, not (samples, tokens)")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise JobError(
            f"{path}: token ids are in [{tokens.min()}, {tokens.max()}], but the model knows {vocabulary}: "
            "they were made with another model's tokenizer"
        )
    return tokens


run = measuring(measure)


def imports() -> None:
    """Import what `run` needs, including a typical decoder's modules; loads no model."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    # Importing `transformers.models.qwen2` alone would not load its modules.
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401


if __name__ == "__main__":
    worker_main(run, imports)
