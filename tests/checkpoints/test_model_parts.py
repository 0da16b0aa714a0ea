from __future__ import annotations

import json

from tiny_quantized import write_float

from quantline.checkpoints import model_parts
from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.model_parts import parts_of


def parts(folder):
    return parts_of(Checkpoint.open(folder), json.loads((folder / "config.json").read_text()))


def test_a_layer_more_adds_a_layer_and_a_tied_output_layer_counts_once(tmp_path):
    two, three = (parts(write_float(tmp_path / str(layers), tied=True, layers=layers)) for layers in (2, 3))
    assert three.total - two.total == three.layer == two.layer
    untied = parts(write_float(tmp_path / "untied", tied=False, layers=2))
    assert untied.total - two.total == untied.table == two.table


def test_small_models_are_kept(tmp_path, monkeypatch):
    found = parts(write_float(tmp_path / "model", layers=2))
    assert found.kept
    monkeypatch.setattr(model_parts, "KEEP_BYTES", 4 * found.total - 1)
    assert not found.kept
