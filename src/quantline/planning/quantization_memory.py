"""The peak memory of quantizing, from headers: a model of what each method holds at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.linears import linear_shapes
from quantline.checkpoints.model_config import dimensions
from quantline.core.cores import tensors_at_once

# The interpreter with torch and a quantizer's library. An assumption: with the demo model, AutoAWQ took 1.28 GB in all, of
# which 0.3 GB are the model and its activations.
TORCH_PROCESS = 1_000_000_000
# Those that take less: the largest process with the demo model (`python -m benchmarks.methods`), less the model.
_SMALLER = {"auto_gptq": 650_000_000, "bitsandbytes": 450_000_000}
PLAIN_PROCESS = 100_000_000
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# The native backend and all writers of results hold one shard at a time.
SHARD = 4_000_000_000


@dataclass(frozen=True)
class Peak:
    """The largest part of each kind, in bytes. formula: what they consist of, in words."""

    model: int
    calibration: int
    solver: int
    process: int
    formula: str

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return self.model + self.calibration + self.solver + self.process


def computed_in(dtype: str, device: str) -> str:
    """The dtype that a quantizer computes in: `auto` is float32 on a CPU and float16 on a GPU."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "float16"


def quantization_peak(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    *,
    method: str,
    backend: str,
    dtype: str,
    tokens: int,
    low_memory: bool,
    output: int,
) -> Peak:
    """The memory that quantizing holds at its peak.

    Args:
        checkpoint, config: the float model's.
        method, backend: the quantization method and the backend that runs it.
        dtype: dtype of the computation, see `computed_in`.
        tokens: calibration tokens of all samples.
        low_memory: whether one block of the model is loaded at a time.
        output: bytes of the result.

    The parts, with h the hidden width, i the widest input of a linear, d the bytes per value of `dtype`:
        model        all values * d; with low_memory the embeddings and one block.
        calibration  a block's inputs and outputs for all samples: 2 * tokens * h * d; for AWQ also the inputs of
                     all its linears, tokens * sum(in) * d (AutoAWQ's input_feat).
        solver       GPTQ (arXiv:2210.17323; AutoGPTQ's gptq.py): the Hessian, its factor and its inverse, 3 * i^2 * 4,
                     and weight, result and losses of the largest linear, 3 * in * out * 4. AWQ (arXiv:2306.00978):
                     two more copies of a block, to scale and to compare. AutoRound (arXiv:2309.05516): a block's rounding,
                     gradients and best values, 3 * 4 bytes per value. rtn: 5 float32 copies of the largest linear a core.
                     bnb: one float32 copy; fp8, fp4 and mxfp8: the largest linear in float32, before, packed and after.
                     gguf: the file in float32, mapped.
    """
    shapes = linear_shapes(checkpoint, config)
    linears = shapes.values()
    largest = max((wide * high for wide, high in linears), default=0)
    widest = max((wide for wide, _ in linears), default=0)
    size = DTYPE_BYTES[dtype]
    if backend == "native":
        at_once = min(tensors_at_once(), len(shapes))
        formula = f"5 float32 copies of the largest linear for each of {at_once} cores, one shard of the result"
        return Peak(0, 0, at_once * 5 * largest * 4, PLAIN_PROCESS + min(SHARD, output), formula)
    library = _SMALLER.get(backend, TORCH_PROCESS)
    numbers = dimensions(config)
    blocks = numbers.layers or 1
    values = sum(_values(checkpoint, name) for name in checkpoint.names)
    in_blocks = sum(wide * high for wide, high in linears)
    block = in_blocks // blocks
    held = values - in_blocks + block if low_memory else values
    streams = 2 * tokens * (numbers.hidden or 0) * size
    weights = f"{'one block' if low_memory else 'all weights'} in {dtype}"
    if method == "bnb":
        return Peak(held * size, 0, largest * 4, library + min(SHARD, output), f"{weights}, the largest linear")
    if method in ("fp8", "fp4", "mxfp8"):
        formula = f"{weights}, a block's activations, the largest linear three times in float32"
        return Peak(held * size, streams, 3 * 4 * largest, library + min(SHARD, output), formula)
    if method == "gguf":
        formula = f"{weights}, a sample's activations, the file in float32"
        return Peak(held * size, 0, values * 4, library, formula)
    if method == "awq":
        features = tokens * sum(wide for wide, _ in linears) // blocks * size
        formula = f"{weights}, a block's activations and its linears' inputs, two copies of a block"
        return Peak(held * size, streams + features, 2 * block * size, library, formula)
    if method == "autoround":
        formula = f"{weights}, a block's activations, 12 bytes for each of its weights"
        return Peak(held * size, streams, 12 * block, library, formula)
    formula = (
        f"{weights}, a block's activations, the widest Hessian three times, the largest linear three times in float32"
    )
    return Peak(held * size, streams, 3 * 4 * (widest * widest + largest), library, formula)


def _values(checkpoint: Checkpoint, name: str) -> int:
    total = 1
    for size in checkpoint.info(name).shape:
        total *= size
    return total
