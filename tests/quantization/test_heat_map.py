from __future__ import annotations

import numpy as np
import pytest

from quantline.checkpoints.linears import place_of
from quantline.quantization.heat_map import draw, grid


def row(layer, module, error):
    return {"layer": layer, "module": module, "output_error": error}


ROWS = [row(0, "self_attn.q_proj", 0.1), row(0, "mlp.up_proj", 0.2), row(1, "mlp.up_proj", 0.3)]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.mlp.up_proj", (11, "mlp.up_proj")),
        ("transformer.h.3.attn.c_proj", (3, "attn.c_proj")),
        ("model.layers.2.mlp.experts.7.w1", (2, "mlp.experts.7.w1")),
        ("lm_head", (-1, "lm_head")),
    ],
)
def test_a_name_is_a_layer_and_a_module_of_it(name, place):
    assert place_of(name) == place


def test_a_cell_is_a_kind_of_linear_in_a_layer():
    layers, kinds, values = grid(ROWS)
    assert (layers, kinds) == ([0, 1], ["self_attn.q_proj", "mlp.up_proj"])
    np.testing.assert_array_equal(values, [[0.1, np.nan], [0.2, 0.3]])


def test_experts_are_one_kind_that_shows_the_worst_of_them():
    rows = [row(0, f"mlp.experts.{expert}.w1", error) for expert, error in enumerate((0.1, 0.4, None, 0.2))]
    layers, kinds, values = grid(rows)
    assert (layers, kinds, values.tolist()) == ([0], ["mlp.experts.*.w1"], [[0.4]])


def test_equal_errors_give_an_equal_picture(tmp_path):
    for name in ("one", "two"):
        assert draw(ROWS, tmp_path / name, "title")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").read_bytes().startswith(b"\x89PNG")
    assert draw([*ROWS, row(1, "self_attn.q_proj", 0.9)], tmp_path / "three", "title")
    assert (tmp_path / "three").read_bytes() != (tmp_path / "one").read_bytes()


def test_low_errors_are_pale_and_high_ones_dark(tmp_path):
    from matplotlib.image import imread

    assert draw([row(0, "a", 0.01), row(1, "a", 1.0)], tmp_path / "two", "title")
    cells = imread(tmp_path / "two")[..., :3].mean(axis=2)
    # Of the picture's left half the palest tenth of what is coloured is the low error, of the right half the high one.
    across = cells[cells.shape[0] // 2]
    left, right = across[int(0.3 * len(across))], across[int(0.7 * len(across))]
    assert left > 0.8
    assert right < 0.45


def test_without_an_error_there_is_no_picture(tmp_path):
    assert not draw([row(0, "mlp.up_proj", None)], tmp_path / "none", "title")
    assert not draw([row(0, "mlp.up_proj", float("inf"))], tmp_path / "none", "title")
    assert not (tmp_path / "none").exists()


def test_many_layers_fit(tmp_path):
    rows = [row(layer, kind, 0.01 * layer) for layer in range(80) for kind in ("a", "b", "c", "d")]
    assert draw(rows, tmp_path / "many", "title")
