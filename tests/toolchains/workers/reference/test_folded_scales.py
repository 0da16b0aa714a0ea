from __future__ import annotations

import json

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.layouts import dequantize, quantize_rtn
from quantline.toolchains.workers.reference.folded_scales import folds, unfold


def relative(values, weight):
    return float(np.linalg.norm(values - weight) / np.linalg.norm(weight))


def matrix(seed, tall=320, wide=384):
    return (np.random.default_rng(seed).normal(size=(tall, wide)) * 0.05).astype(np.float32)


def scales(seed, size, spread=0.5):
    return np.exp(np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


def rounded(weight, bits=4, symmetric=True):
    return dequantize(quantize_rtn(weight, bits, 128, symmetric))


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
def test_weights_that_are_scaled_and_nothing_else_have_no_error(spread):
    weight = matrix(0)
    folded = weight * scales(1, 320, spread)[:, None] * scales(2, 384, spread)
    assert spread == 0 or relative(folded, weight) > 0.3
    assert relative(unfold(folded, weight), weight) < 1e-5


@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (4, True), (4, False), (8, True)])
def test_the_error_of_plain_rounding_hardly_changes(bits, symmetric):
    weight = matrix(3)
    plain = rounded(weight, bits, symmetric)
    assert relative(unfold(plain, weight), weight) == pytest.approx(relative(plain, weight), rel=0.02)


@pytest.mark.parametrize(("spread", "within"), [(0.25, 0.02), (0.7, 0.1)])
def test_scales_around_a_rounding_are_undone(spread, within):
    weight, rows, columns = matrix(4), scales(5, 320), scales(6, 384, spread)
    approximation = rounded(weight * columns)
    true = relative(approximation / columns, weight)
    assert relative(unfold(approximation * rows[:, None], weight), weight) == pytest.approx(true, rel=within)


def test_a_fault_is_not_taken_for_a_scale():
    weight = matrix(7)
    negated, gone, swapped = weight.copy(), weight.copy(), weight[::-1].copy()
    negated[:, :96] *= -1
    gone[:, :96] = 0
    assert relative(unfold(negated, weight), weight) == pytest.approx(1.0, abs=0.05)  # twice the weight in a quarter
    assert relative(unfold(gone, weight), weight) == pytest.approx(0.5, abs=0.02)
    assert relative(unfold(swapped, weight), weight) > 1


def test_a_weight_of_zeros_stays_one():
    weight = np.zeros((64, 64), np.float32)
    assert not unfold(weight, weight).any()
    assert relative(unfold(np.zeros_like(matrix(8)), matrix(8)), matrix(8)) == 1


@pytest.mark.parametrize(("factor", "folded"), [(1.0, False), (1.0004, False), (1.5, True)])
def test_norms_tell_whether_something_was_folded_into_them(tmp_path, factor, folded):
    norm = np.random.default_rng(0).normal(1, 0.1, 64).astype(np.float32)
    changed = norm.copy()
    changed[3] *= factor
    for name, values in (("float", norm), ("other", changed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({}))
        tensors = {"model.layers.0.input_layernorm.weight": values, "model.layers.0.mlp.up_proj.bias": values * 3}
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
    assert folds(Checkpoint.open(tmp_path / "float"), Checkpoint.open(tmp_path / "other")) is folded
