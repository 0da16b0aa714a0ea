"""What every layout answers about itself."""

from __future__ import annotations

import numpy as np
import pytest

from quantline.checkpoints.layouts import LAYOUTS, Storage, dequantize, quantize_rtn
from quantline.checkpoints.layouts.layout import Layout
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.safetensors_file import safetensors_dtype

AFFINE = [layout for layout in LAYOUTS.values() if layout.affine is not None]


def specs_of(layout: Layout) -> list[LinearSpec]:
    shape = (64, 128)
    every = [LinearSpec(bits, size) for bits in (2, 3, 4, 8) for size in (-1, 32, 64)]
    return [spec for spec in every if not layout.faults(shape, spec, Storage())]


@pytest.mark.parametrize("layout", AFFINE, ids=lambda layout: layout.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_tensors_are_those_that_it_says(layout: Layout, symmetric: bool) -> None:
    weight = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    specs = specs_of(layout)
    assert specs
    for spec in specs:
        if layout.activations and not symmetric:
            continue
        linear = quantize_rtn(weight, spec.bits, spec.group_size, symmetric)
        written = layout.write(linear)
        storage = Storage(zero_points=not linear.symmetric)
        said = layout.specs((64, 128), spec, storage)
        assert {name: (safetensors_dtype(array.dtype), array.shape) for name, array in written.items()} == {
            name: (one.dtype, one.shape) for name, one in said.items()
        }
        assert layout.bytes_of((64, 128), spec, storage).total == sum(array.nbytes for array in written.values())
        assert layout.shape(written, spec.bits) == (64, 128)
        read = layout.dequantize(written, bits=spec.bits, group_size=spec.group_size)
        assert np.array_equal(read, dequantize(linear))
        names = {f"a.b.{suffix}": safetensors_dtype(array.dtype) for suffix, array in written.items()}
        (found,) = layout.linears({**names, "c.weight": "F16"}).items()
        assert found[0] == "a.b"
        assert not found[1].missing
        assert set(found[1].tensors.values()) == set(names)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_its_parts_are_among_its_tensors(layout: Layout) -> None:
    # One tensor may hold codes and scales; then no suffix is that of the codes alone.
    assert {layout.codes, *layout.scales, *layout.zeros} - {""} <= set(layout.tensors)
    assert layout.codes or not layout.scales
    assert layout.nearest([LinearSpec(4, 32)], True, False) in {None, *LAYOUTS}
