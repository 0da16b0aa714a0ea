"""The layout: bits and groups of every linear from the file itself, its section of config.json, its bytes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from gguf_files import random_rows, small_model

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers
from quantline.checkpoints.float_view import FloatView
from quantline.checkpoints.layouts import LAYOUTS, FormatError, Storage
from quantline.checkpoints.layouts.description import Description
from quantline.checkpoints.layouts.gguf.blocks import BLOCK_TYPES
from quantline.checkpoints.layouts.gguf.layout import NAME, spec_of
from quantline.checkpoints.layouts.linear_spec import LayerSettings, LinearSpec
from quantline.checkpoints.quantization_config import section_of
from quantline.core.errors import CheckpointError

LAYOUT = LAYOUTS[NAME]
Q = "model.layers.0.self_attn.q_proj"
MAIN = LayerSettings(4, 32, True)


def test_linears_embeddings_and_their_types_are_those_of_the_file(tmp_path):
    folder = small_model(tmp_path, kind="Q6_K")
    info, checkpoint = quantization_of(folder), Checkpoint.open(folder)
    layers = quantized_layers(checkpoint, info)
    assert layers[Q] == {"q6_k": f"{Q}.q6_k"}
    assert len(layers) == 8  # seven linears and the embeddings
    assert (info.of(Q).bits, info.of(Q).group_size) == (6, 16)
    assert (info.of("model.embed_tokens").bits, info.of("model.embed_tokens").group_size) == (8, 32)
    assert info.layout == NAME
    assert info.activations is None


def test_the_model_is_whole_under_its_float_names(tmp_path):
    view = FloatView.open(small_model(tmp_path, kind="IQ4_XS"))
    assert view.shape(f"{Q}.weight") == view.values(f"{Q}.weight").shape == (256, 256)
    assert view.shape("model.layers.0.self_attn.k_proj.weight") == (128, 256)
    assert np.isfinite(view.values("model.embed_tokens.weight")).all()


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_bytes_of_a_linear_are_those_of_its_blocks(kind):
    one = BLOCK_TYPES[kind]
    shape = (one.weights * 3, 7)
    size = LAYOUT.bytes_of(shape, spec_of(kind), Storage())
    assert size.total == size.codes == 7 * 3 * one.nbytes
    assert LAYOUT.faults(shape, spec_of(kind), Storage()) == []
    _, rows = random_rows(kind, 7, shape[0])
    assert LAYOUT.shape({kind.lower(): rows}, 0) == shape


def test_rows_that_are_no_whole_blocks_and_bits_without_a_type_are_faults():
    (fault,) = LAYOUT.faults((300, 4), spec_of("Q4_K"), Storage())
    assert str(fault) == "in_features=300 is no multiple of 256, the block of Q4_K; leave it in float"
    (fault,) = LAYOUT.faults((256, 4), LinearSpec(4, 32), Storage())
    assert "has 4 bits of no block type" in str(fault)


def test_a_linear_of_two_types_or_of_none_is_refused():
    row = random_rows("Q4_0", 2, 32)[1]
    with pytest.raises(FormatError, match="has the blocks q4_0, q8_0: a linear has one type"):
        LAYOUT.dequantize({"q4_0": row, "q8_0": row}, bits=4, group_size=32)
    with pytest.raises(FormatError, match="has the blocks of no type"):
        LAYOUT.dequantize({}, bits=4, group_size=32)


def test_the_section_names_mixture_and_file():
    section = section_of(NAME, Description(MAIN, options={"type": "IQ3_S", "imatrix": True}))
    assert section == {"quant_method": "gguf", "type": "IQ3_S", "imatrix": True, "file": "model.gguf"}
    with pytest.raises(CheckpointError, match="no mixture 'Q9_K'; known are Q8_0"):
        section_of(NAME, Description(MAIN, options={"type": "Q9_K"}))


def test_a_file_elsewhere_is_refused(tmp_path):
    folder = small_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["file"] = "../model.gguf"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"must be the name of a file beside config\.json"):
        quantization_of(folder)


def test_a_file_that_is_written_again_is_read_again(tmp_path):
    folder = small_model(tmp_path / "a", kind="Q4_0")
    assert quantization_of(folder).of(Q).bits == 4
    other = small_model(tmp_path / "b", kind="Q8_0")
    shutil.copyfile(other / "model.gguf", folder / "model.gguf")
    assert quantization_of(folder).of(Q).bits == 8


def test_it_is_kept_and_not_converted():
    assert LAYOUT.affine is None
    assert LAYOUT.target is None
    assert LAYOUT.nearest([spec_of("Q4_K")], True, False) is None
    with pytest.raises(FormatError, match="have no codes on a grid"):
        LAYOUT.read({}, bits=4, group_size=32)
