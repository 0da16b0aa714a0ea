"""Convert large linears of one code per byte band by band: pack, write, read back and compare while in the cache.

A band is contiguous in the output: input columns for the layouts that store them first, output channels for
compressed-tensors. The source stays mapped while its linear is converted; beyond that, two bands of words are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.layouts import FormatError, Layout, round_scales
from quantline.checkpoints.layouts.affine import Grid, sequential_groups
from quantline.checkpoints.layouts.layout import Bands
from quantline.checkpoints.safetensors_stream import StreamedFile
from quantline.conversion import kernels
from quantline.conversion.errors import ProofError
from quantline.conversion.plan import ConversionPlan
from quantline.conversion.proof import same_grid
from quantline.conversion.source import SourceLayer

# Codes of a band. It fits into the processor's last-level cache beside those of other threads, and its rows are long:
# each starts on another page, and a page lookup costs as much as packing some hundred codes.
BAND = 1 << 23
# The smallest buffer, in words, that the system backs by large pages.
_LARGE = 1 << 20
# The smallest checkpoint, in codes, for which loading the kernels pays, and compiling them once per machine.
LEAST_CODES = 1 << 28
# The fewest columns of a band: a row is then a cache line. A multiple of the codes of a word.
_LEAST_COLUMNS = 64
# The fewest output channels that a kernel can take.
_LEAST_ROWS = {"across": 8 * kernels.ROWS, "along": kernels.ROWS, "flat": 1}


def worth_it(plan: ConversionPlan) -> bool:
    """Whether the kernels are usable and the linears that they can convert have at least `LEAST_CODES` codes."""
    from quantline.conversion.kernels_jit import usable

    layers = [layer for layer in plan.source.layers.values() if fits(plan, layer)]
    return sum(layer.in_features * layer.out_features for layer in layers) >= LEAST_CODES and usable()


def fits(plan: ConversionPlan, layer: SourceLayer) -> bool:
    """Whether the kernels can convert it: one code per byte, whole words, and at least as many rows as a kernel takes."""
    target = _bands(plan.layout)
    if not _one_code_per_byte(layer) or plan.requantize or target is None:
        return False
    return layer.in_features % 8 == 0 and layer.out_features >= _LEAST_ROWS[target.kernel]


def _one_code_per_byte(layer: SourceLayer) -> bool:
    return layer.layout.affine is not None and layer.layout.affine.check_bytes is not None


def _bands(layout: Layout) -> Bands | None:
    return None if layout.affine is None else layout.affine.bands


def convert(plan: ConversionPlan, layer: SourceLayer, file: StreamedFile) -> tuple[Grid, Grid]:
    """Write a linear, read all of it back and compare.

    Returns:
        the grid of its codes in the source and as written; their scales may differ by the cast.

    Raises:
        ProofError: the file's content differs from what was written.
        FormatError: the linear's tensors do not have the layout's form.
    """
    outline = plan.source.outline(layer, False)[0]
    groups = sequential_groups(layer.in_features, layer.group_size)
    before = Grid(outline.scales, outline.zeros, groups, layer.bits, layer.group_size)
    after = round_scales(before) if plan.cast_scales and before.scales.dtype != np.float16 else before
    affine, written = plan.layout.affine, _bands(plan.layout)
    assert affine is not None
    assert written is not None
    grid_tensors = written.write_grid(after, **({"zero_points": plan.zero_points} if affine.optional_zeros else {}))
    for suffix, array in grid_tensors.items():
        file.put(f"{layer.name}.{suffix}", array)
    name = f"{layer.name}.{plan.layout.codes}"
    info = file.infos[name]
    codes = plan.source.tensors.view(layer.tensors[layer.layout.codes])
    file.put_chunks(name, info.dtype, info.shape, _words(written.kernel, layer, codes, file, name))
    stored = {suffix: file.get(f"{layer.name}.{suffix}") for suffix in grid_tensors}
    shape = (layer.in_features, layer.out_features)
    try:
        again = written.read_grid(stored, shape, bits=layer.bits, group_size=layer.group_size)
    except FormatError as error:
        raise ProofError(f"{layer.name}: what was written to {file.path.name} does not read back: {error}") from error
    if faults := same_grid(after, again):
        raise ProofError(f"{layer.name}: {', '.join(faults)} read back from {file.path.name} differ from the source's")
    return before, after


def _words(
    kind: str, layer: SourceLayer, codes: NDArray[np.int8], file: StreamedFile, name: str
) -> Iterator[memoryview]:
    """The words, one band at a time. When the next band is requested, the last one is compared with the file."""
    words = np.empty(0, dtype=np.uint32)
    position = 0
    for size, pack, differ in bands(kind, layer, codes):
        if words.size < size:
            words, back = (np.empty(max(size, _LARGE), dtype=np.uint32) for _ in range(2))
        pack(words.ctypes.data)
        yield words[:size].data.cast("B")
        file.get_part(name, position, back[:size].data.cast("B"))
        if differ(back.ctypes.data):
            raise ProofError(f"{layer.name}: codes read back from {file.path.name} differ from the source's")
        position += 4 * size


def bands(
    kind: str, layer: SourceLayer, codes: NDArray[np.int8]
) -> Iterator[tuple[int, Callable[[int], int], Callable[[int], int]]]:
    """For every band: its number of words, a function that packs it to an address, and one that compares it with an address.

    kind: how codes are packed: along, across or flat.
    """
    from quantline.conversion.kernels_jit import kernel

    rows, columns, bits = layer.out_features, layer.in_features, layer.bits
    tile = np.empty((kernels.ROWS, kernels.COLUMNS), dtype=np.uint32)
    start, scratch = codes.ctypes.data, tile.ctypes.data
    pack, differ = kernel(f"pack_{kind}"), kernel(f"differ_{kind}")
    if kind == "flat":
        for first, count in _spans(rows, BAND // columns, 1):
            place: tuple[int, ...] = (start + first * columns, count * columns, bits)
            yield count * columns * bits // 32, partial(pack, *place), partial(differ, *place)
        return
    for first, count in _spans(columns, BAND // rows, _LEAST_COLUMNS):
        place = (start + first, columns, rows, count, *((bits,) if kind == "along" else ()))
        yield count * rows * bits // 32, _with(pack, place, scratch), _with(differ, place, scratch)


def _with(called: Callable[..., int], place: tuple[int, ...], scratch: int) -> Callable[[int], int]:
    return lambda words: called(*place, words, scratch, scratch)


def _spans(total: int, step: int, least: int) -> Iterator[tuple[int, int]]:
    """Start and length of consecutive runs of about `step`, a multiple of `least`; the last may be shorter."""
    step = max(least, step // least * least)
    for start in range(0, total, step):
        yield start, min(step, total - start)
