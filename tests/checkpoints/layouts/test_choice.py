"""Which layout is written, and which one a conversion makes of it."""

from __future__ import annotations

import pytest

from quantline.checkpoints.layouts import LAYOUTS
from quantline.checkpoints.layouts.choice import converted, layout_of, written_by
from quantline.checkpoints.layouts.linear_spec import LinearSpec

FOUR, EIGHT = LinearSpec(4, 128), LinearSpec(8, 128)


@pytest.mark.parametrize(
    ("specs", "symmetric", "layout"),
    [
        ({FOUR}, True, "gptq"),
        ({FOUR}, False, "awq_gemm"),
        ({FOUR, EIGHT}, False, "gptq_v2"),
        ({EIGHT}, False, "gptq_v2"),
    ],
)
def test_rounding_to_nearest(specs: set[LinearSpec], symmetric: bool, layout: str) -> None:
    assert layout_of(specs, symmetric) == layout
    assert written_by("native", "rtn", {}, specs, symmetric) == layout


@pytest.mark.parametrize(
    ("backend", "method", "options", "layout"),
    [
        ("bitsandbytes", "bnb", {}, "bitsandbytes"),
        ("llmcompressor", "gptq", {}, "compressed_tensors"),
        ("llmcompressor", "rtn", {"activation_bits": 8}, "compressed_tensors_int"),
        ("autoawq", "awq", {"version": "gemv"}, "awq_gemv"),
        ("autoawq", "awq", {"version": "exllama"}, "awq_gemm"),
        ("gptqmodel", "awq", {}, "awq_gemm"),
        ("auto_gptq", "gptq", {}, "gptq"),
    ],
)
def test_backends(backend: str, method: str, options: dict[str, object], layout: str) -> None:
    assert written_by(backend, method, options, {FOUR}, True) == layout


@pytest.mark.parametrize(
    ("source", "target", "bits", "symmetric", "made"),
    [
        ("awq_gemv", "auto", {4}, False, "awq_gemm"),
        ("gptq_v2", "auto", {4}, True, "gptq"),
        ("gptq_v2", "auto", {4}, False, "compressed_tensors"),
        ("gptq", "auto", {4}, True, "gptq"),
        ("gptq", "auto", {4, 8}, True, "gptq"),
        ("gptq", "auto", {3}, True, "compressed_tensors"),
        ("gptq", "auto", {2, 4}, True, "compressed_tensors"),
        ("gptq", "auto", {4}, False, "compressed_tensors"),
        ("msmodelslim_v1", "auto", {4}, False, "awq_gemm"),
        ("msmodelslim", "auto", {4, 8}, False, "compressed_tensors"),
        ("bitsandbytes", "auto", {4}, True, "bitsandbytes"),
        ("awq_gemm", "keep", {4}, False, "awq_gemm"),
        ("gptq", "compressed_tensors", {4}, False, "compressed_tensors"),
    ],
)
def test_conversions(source: str, target: str, bits: set[int], symmetric: bool, made: str) -> None:
    specs = {LinearSpec(one, 128) for one in bits}
    assert converted(LAYOUTS[source], target, specs, symmetric=symmetric).name == made


def test_gptq_in_other_groups_becomes_compressed_tensors_unless_columns_are_reordered() -> None:
    for size, reordered, made in [(256, False, "compressed_tensors"), (256, True, "gptq"), (-1, True, "gptq")]:
        found = converted(LAYOUTS["gptq"], "auto", {LinearSpec(4, size)}, symmetric=True, reordered=reordered)
        assert found.name == made
