"""Large linears of one code a byte, converted band by band: packed, written, read back and compared while in the cache.

A band is what lies in one piece in the output: input columns for the layouts that store them first, output channels for
compressed-tensors. The source is mapped for as long as a linear takes; memory of our own are two bands of words.
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

# Codes of a band, so that it stays in the processor's last cache beside those of other threads, and rows of it are long:
# each begins on another page, and to find a page costs as much as to pack some hundred codes.
BAND = 1 << 23
# Words of the least memory that the system backs by large pages.
_LARGE = 1 << 20
# Codes of a checkpoint from which on the kernels are worth being loaded and, once a machine, compiled.
LEAST_CODES = 1 << 28
# Columns of a band at least, so that a row of it is a line of the cache; a multiple of the codes of a word.
_LEAST_COLUMNS = 64
# Rows of words that a kernel takes at a time, in codes of the side that it packs along.
_LEAST_ROWS = {"across": 8 * kernels.ROWS, "along": kernels.ROWS, "flat": 1}


def worth_it(plan: ConversionPlan) -> bool:
    """Whether the linears that the kernels can convert have `LEAST_CODES` codes or more, and the kernels are usable."""
    from quantline.conversion.kernels_jit import usable

    layers = [layer for layer in plan.source.layers.values() if fits(plan, layer)]
    return sum(layer.in_features * layer.out_features for layer in layers) >= LEAST_CODES and usable()


def fits(plan: ConversionPlan, layer: SourceLayer) -> bool:
    """Whether the kernels can do it: one code a byte, whole words, and no fewer rows of words than they take at a time."""
    written = _bands(plan.layout)
    if not _lies_by_bytes(layer) or plan.requantize or written is None:
        return False
    return layer.in_features % 8 == 0 and layer.out_features >= _LEAST_ROWS[written.kernel]


def _lies_by_bytes(layer: SourceLayer) -> bool:
    return layer.layout.affine is not None and layer.layout.affine.check_bytes is not None


def _bands(layout: Layout) -> Bands | None:
    return None if layout.affine is None else layout.affine.bands


def convert(plan: ConversionPlan, layer: SourceLayer, file: StreamedFile) -> tuple[Grid, Grid]:
    """Write a linear and compare it, all of it, with what the file gives back.

    Returns:
        what its codes stand for, in the source and as written: the scales may differ by their cast.

    Raises:
        ProofError: something reads back as something else.
        FormatError: the linear's tensors are not what the layout says.
    """
    outline = plan.source.outline(layer, False)[0]
    groups = sequential_groups(layer.in_features, layer.group_size)
    before = Grid(outline.scales, outline.zeros, groups, layer.bits, layer.group_size)
    after = round_scales(before) if plan.cast_scales and before.scales.dtype != np.float16 else before
    affine, written = plan.layout.affine, _bands(plan.layout)
    assert affine is not None
    assert written is not None
    partners = written.write_grid(after, **({"zero_points": plan.zero_points} if affine.optional_zeros else {}))
    for suffix, array in partners.items():
        file.put(f"{layer.name}.{suffix}", array)
    name = f"{layer.name}.{plan.layout.codes}"
    info = file.infos[name]
    codes = plan.source.tensors.view(layer.tensors[layer.layout.codes])
    file.put_chunks(name, info.dtype, info.shape, _words(written.kernel, layer, codes, file, name))
    stored = {suffix: file.get(f"{layer.name}.{suffix}") for suffix in partners}
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
    """The words, a band at a time; what was made of a band is compared with the file when the next is asked for."""
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
    """Of every band the number of its words, and how to pack it to an address and to compare what lies at one.

    kind: the way that codes are packed: along, across or flat.
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
