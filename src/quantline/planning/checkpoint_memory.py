"""Memory, calculated from headers and configs before anything is computed. All sizes are bytes.

The size of a checkpoint is exact: the sum of its layout's tensors. Everything else is a model of what libraries do, with
its source, good enough to tell what fits from what does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts import LAYOUTS, Storage
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LinearSpec
from quantline.checkpoints.layouts.sizes import LinearBytes
from quantline.checkpoints.model_config import ties_head
from quantline.serving.memory import GIB

# Memory besides weights, cache and activations: CUDA context, kernels, allocator slack. An assumption.
GPU_CONTEXT = GIB


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights.

    float_source: bytes in the float model's files. packed: the quantized linears. left_float: everything else, at two bytes
    per value (four in GGUF): embeddings (tied ones once), norms, biases, linears that are not quantized.
    quantized_parameters: values of the quantized linears. parameters: values of the whole model.
    """

    float_source: int
    packed: LinearBytes
    left_float: int
    quantized_parameters: int
    parameters: int

    @property
    def total(self) -> int:
        """Size of the quantized checkpoint."""
        return self.packed.total + self.left_float

    @property
    def bits_per_quantized_weight(self) -> float:
        """Bits per quantized value, including its share of scales and zero points."""
        return 8 * self.packed.total / self.quantized_parameters if self.quantized_parameters else 16.0

    @property
    def bits_per_weight(self) -> float:
        """Bits per value over the whole model, quantized or not."""
        return 8 * self.total / self.parameters


def weights_of(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    widths: Mapping[str, LinearSpec],
    layout: str,
    storage: Storage,
) -> Weights:
    """The size of the quantized checkpoint, from the float model's headers.

    layout: key of `layouts.LAYOUTS`; empty if nothing is quantized. storage: the other properties that decide its tensors.
    """
    packed, left, quantized, parameters, source = LinearBytes(), 0, 0, 0, 0
    for name in checkpoint.names:
        info = checkpoint.info(name)
        source += info.nbytes
        if name == f"{LM_HEAD}.weight" and ties_head(config):
            continue  # the embedding table under a second name
        values = _product(info.shape)
        parameters += values
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight" and layer in widths:
            wide, high = info.shape[1], info.shape[0]
            packed += LAYOUTS[layout].bytes_of((wide, high), widths[layer], storage)
            quantized += values
        else:
            left += values * (4 if layout and LAYOUTS[layout].whole else 2)
    return Weights(source, packed, left, quantized, parameters)


def _product(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
