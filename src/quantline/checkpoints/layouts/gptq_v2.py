"""GPTQ v2 (``checkpoint_format: gptq_v2``): GPTQ v1 with z itself in qzeros instead of z - 1.

Shapes, dtypes, bit order and formula are those of `gptq`; a zero point of 0 needs no special case here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from numpy.typing import NDArray

from quantline.checkpoints.layouts import gptq, gptq_config
from quantline.checkpoints.layouts.affine import AffineLinear, Grid
from quantline.checkpoints.layouts.checks import Tensors
from quantline.checkpoints.layouts.gptq import (
    CODES,
    TENSORS,
    read_stored,
    read_stored_grid,
    write_stored,
    write_stored_grid,
)
from quantline.checkpoints.layouts.layout import Affine, Bands, ConfigSection, Layout, weights_of

__all__ = ["CODES", "LAYOUT", "NAME", "TENSORS", "read", "read_grid", "write", "write_grid"]

NAME = "gptq_v2"


def read(tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
    """Read one layer; ``tensors`` is keyed by suffix and stays unchanged.

    Raises:
        FormatError: tensors are missing or unknown, shapes disagree, or bits do not fit the words.
    """
    return read_stored(tensors, bits=bits, group_size=group_size, subtracted=0)


def write(linear: AffineLinear) -> dict[str, NDArray[Any]]:
    """Write one layer, keyed by suffix; g_idx is always written.

    Raises:
        FormatError: in or out does not fill whole 32-bit words.
    """
    return write_stored(linear, subtracted=0)


def read_grid(tensors: Tensors, shape: tuple[int, ...], *, bits: int, group_size: int) -> Grid:
    """Read everything but the codes of a layer of ``shape`` (in, out); raises what `read` raises."""
    return read_stored_grid(tensors, shape, bits=bits, group_size=group_size, subtracted=0)


def write_grid(grid: Grid) -> dict[str, NDArray[Any]]:
    """Write everything but the codes; raises what `write` raises."""
    return write_stored_grid(grid, subtracted=0)


# Some readers do not mask the v1 field of a zero point of 0, so only symmetric checkpoints are converted to v1.
LAYOUT = Layout(
    name=NAME,
    method=gptq_config.METHOD,
    tensors=TENSORS,
    codes=CODES,
    scales=("scales",),
    zeros=("qzeros",),
    specs=gptq.specs,
    shape=gptq.shape_of,
    faults=partial(gptq.faults, NAME),
    dequantize=weights_of(read),
    affine=Affine(read, write, half_scales=True, bands=Bands("along", read_grid, write_grid)),
    config=ConfigSection(partial(gptq_config.describe, NAME), gptq_config.parse, own_file=gptq_config.OWN_FILE),
    mixed=True,
    desc_act=True,
    target="gptq_v2",
    nearest=lambda specs, symmetric, reordered: (
        gptq.nearest(specs, symmetric, reordered) or (gptq.NAME if symmetric else None)
    ),
)
