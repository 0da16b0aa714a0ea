"""What every layout answers, and that nothing outside of layouts/ asks for a layout's name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quantline.checkpoints.layouts import LAYOUTS, Storage, dequantize, quantize_rtn
from quantline.checkpoints.layouts.layout import Layout
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.safetensors_file import safetensors_dtype

AFFINE = [layout for layout in LAYOUTS.values() if layout.affine is not None]
# Names that are no method, backend or library too: in code outside of layouts/ they have no place at all.
UNMISTAKABLE = set(LAYOUTS) - {"gptq", "bitsandbytes", "msmodelslim", "compressed_tensors"}
# The values that a configuration may have; a test holds that they are the layouts' targets.
ALLOWED = {"config/convert.py"}


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
    assert {layout.codes, *layout.scales, *layout.zeros} <= set(layout.tensors)
    assert layout.nearest({4}, True) in {None, *LAYOUTS}


def sources() -> Iterator[tuple[str, ast.Module]]:
    root = Path(__file__).resolve().parents[3] / "src" / "quantline"
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith("checkpoints/layouts/"):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def docstrings(tree: ast.Module) -> set[int]:
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def names_in(node: ast.AST) -> set[str]:
    return {one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def is_layout(node: ast.AST) -> bool:
    return "layout" in ast.unparse(node).lower()


def asked(tree: ast.Module) -> Iterator[str]:
    """Conditions on a layout's name: comparisons and look-ups, and names that can mean nothing else."""
    described = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in UNMISTAKABLE and id(node) not in described:
            yield str(node.value)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(is_layout(side) for side in sides) and any(names_in(side) & set(LAYOUTS) for side in sides):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_question(node, node.func):
            yield ast.unparse(node)


def is_question(call: ast.Call, method: ast.Attribute) -> bool:
    if method.attr in ("startswith", "endswith", "split", "removeprefix"):
        return is_layout(method.value)
    return method.attr == "get" and bool(call.args) and is_layout(call.args[0]) and bool(names_in(method.value))


def test_no_module_outside_of_layouts_asks_for_a_name() -> None:
    found = [f"{name}: {what}" for name, tree in sources() if name not in ALLOWED for what in asked(tree)]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        'if layout == "gptq": pass',
        'if source.layout in ("gptq", "half"): pass',
        'if layout.startswith("awq"): pass',
        'kind = {"gptq": 1}.get(layout)',
        'written = "awq_gemm"',
    ],
)
def test_a_question_for_a_name_is_seen(code: str) -> None:
    assert list(asked(ast.parse(code)))
