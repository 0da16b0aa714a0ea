"""A GGUF file as a float model: every weight to the bit, and said plainly what it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf_files import small_model
from tiny_model import write_tokenizer

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of
from quantline.checkpoints.float_view import FloatView
from quantline.conversion.errors import ConversionError
from quantline.conversion.from_gguf import restore_float


@pytest.fixture
def source(tmp_path):
    """A file of another tool: config.json does not say that it is quantized."""
    folder = small_model(tmp_path / "source", kind="Q3_K")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.gguf").rename(folder / "someone-Q3_K_S.gguf")
    write_tokenizer(folder)
    return folder


def test_every_weight_of_the_file_is_in_the_float_model_to_the_bit(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    told = restore_float(source, out)
    assert quantization_of(out) is None
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gguf", "type": "Q3_K_S", "file": "someone-Q3_K_S.gguf"}
    (source / "config.json").write_text(json.dumps(config))
    before, after = FloatView.open(source), Checkpoint.open(out)
    assert set(before.names) == set(after.names)
    for name in after.names:
        assert after.info(name).dtype == "F32"
        np.testing.assert_array_equal(after.tensor(name).view(np.uint32), before.values(name).view(np.uint32))
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in out.iterdir()}
    assert "8 were in the block types q3_k, q8_0" in told[0]
    assert "what it lost when it was quantized stays lost" in told[1]


@pytest.mark.parametrize(
    ("missing", "words"),
    [("someone-Q3_K_S.gguf", "has 0 GGUF files"), ("config.json", "has no config.json; copy it"),
     ("tokenizer.json", "tokenizer")],
)  # fmt: skip
def test_what_is_missing_beside_the_file_is_named(source, tmp_path, missing, words):
    (source / missing).unlink()
    with pytest.raises(ConversionError, match=words):
        restore_float(source, tmp_path)
