"""Memory, counted from headers and configs before anything is computed. All sizes are bytes.

What a checkpoint holds is exact: its layout's tensors, one by one. The rest are models of what libraries do, each with
its source, meant to tell what cannot fit from what can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts import LAYOUTS, Storage
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.layouts.sizes import LinearBytes
from quantline.checkpoints.linears import LM_HEAD
from quantline.serving.memory import GIB

# What is neither weights, cache nor activations: a CUDA context, kernels, the allocator's slack. An assumption.
GPU_CONTEXT = GIB


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights.

    float_source: as the float model's files hold them. packed: the quantized linears. left_float: everything else, at two
    bytes a value: embeddings (tied ones once), norms, biases, linears that are not quantized. quantized_parameters and
    parameters: values in either.
    """

    float_source: int
    packed: LinearBytes
    left_float: int
    quantized_parameters: int
    parameters: int

    @property
    def total(self) -> int:
        """What the quantized checkpoint holds."""
        return self.packed.total + self.left_float

    @property
    def bits_per_quantized_weight(self) -> float:
        """Of a quantized value, its share of scales and zero points included."""
        return 8 * self.packed.total / self.quantized_parameters if self.quantized_parameters else 16.0

    @property
    def bits_per_weight(self) -> float:
        """Over all values of the model, quantized or not."""
        return 8 * self.total / self.parameters


def weights_of(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    widths: Mapping[str, LinearSpec],
    layout: str,
    storage: Storage,
) -> Weights:
    """The size of the checkpoint that quantizing makes, from the float model's headers.

    layout: key of `layouts.LAYOUTS`; empty where nothing is quantized. storage: what else decides its tensors.
    """
    packed, left, quantized, parameters, source = LinearBytes(), 0, 0, 0, 0
    for name in checkpoint.names:
        info = checkpoint.info(name)
        source += info.nbytes
        if name == f"{LM_HEAD}.weight" and config.get("tie_word_embeddings"):
            continue  # the embedding table under a second name
        values = _product(info.shape)
        parameters += values
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight" and layer in widths:
            wide, high = info.shape[1], info.shape[0]
            packed += LAYOUTS[layout].bytes_of((wide, high), widths[layer], storage)
            quantized += values
        else:
            left += values * 2
    return Weights(source, packed, left, quantized, parameters)


def _product(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
