"""The types of tensors: those that `llama-quantize` itself wrote, tensor by tensor, see tests/support/llama_quantize.py."""

from __future__ import annotations

import json

import llama_quantize
import pytest

from quantline.checkpoints.layouts.gguf.header import read_gguf
from quantline.checkpoints.layouts.gguf.mixtures import (
    MIXTURES,
    NEEDS_IMATRIX,
    Traits,
    in_order,
    requires_imatrix,
    types,
)

FOUND = json.loads(llama_quantize.KEPT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name in llama_quantize.MODELS:
        path = folder / f"{name}.gguf"
        path.write_bytes(llama_quantize.model(name))
        found[name] = {tensor: one.shape for tensor, one in read_gguf(path).tensors.items()}
    return found


def test_the_programs_files_are_of_every_mixture_and_of_models_that_differ_in_what_decides():
    assert {case.split()[1] for case in FOUND} == set(MIXTURES)
    assert {case.split()[0] for case in FOUND} == set(llama_quantize.MODELS)
    assert len(FOUND) == 216


@pytest.mark.parametrize("case", FOUND)
def test_every_tensor_has_the_type_that_the_program_gave_it(shapes, case):
    name, mixture, *weighed = case.split()
    architecture, layers, heads, keys, _, experts, _ = llama_quantize.MODELS[name]
    chosen = types(mixture, shapes[name], Traits(architecture, layers, heads, keys, experts, imatrix=bool(weighed)))
    kinds = [chosen.get(tensor, "F32") for tensor in in_order(list(shapes[name]))]
    assert llama_quantize.runs(kinds) == FOUND[case]["types"]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_mixtures_that_need_an_importance_matrix_are_those_with_a_tensor_that_does(shapes, mixture):
    chosen = types(mixture, shapes["own-keys"], Traits("llama", 24, 4, 4))
    needing = any(requires_imatrix(name, kind, mixture) for name, kind in chosen.items())
    assert needing == (mixture in NEEDS_IMATRIX)
