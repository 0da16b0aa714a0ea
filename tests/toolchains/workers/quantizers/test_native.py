from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, write_safetensors
from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import dequantize, quantize_rtn
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import native
from quantline.toolchains.workers.quantizers import output as _output

CONFIG = {"model_type": "qwen2", "tie_word_embeddings": True, "torch_dtype": "bfloat16"}


def silent(done, total, label=""):
    """A reporter for tests."""


def weights(width=64, **more):
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.normal(size=shape).astype(ml_dtypes.bfloat16)

    return {
        "model.embed_tokens.weight": normal(32, width),
        "lm_head.weight": normal(32, width),
        "model.norm.weight": normal(width),
        "model.layers.0.input_layernorm.weight": normal(width),
        "model.layers.0.self_attn.q_proj.weight": normal(64, width),
        "model.layers.0.self_attn.q_proj.bias": normal(64),
        "model.layers.0.mlp.gate.weight": normal(4, width),
        "model.layers.0.mlp.experts.0.up_proj.weight": normal(96, width),
        **more,
    }


@pytest.fixture
def model(tmp_path):
    def build(config=CONFIG, **more):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        write_safetensors(folder / "model.safetensors", weights(**more))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "pytorch_model.bin").write_text("no companion")
        return folder

    return build


def quantize(folder, bits=4, group_size=32, **options):
    output = folder.parent / "output"
    output.mkdir()
    job = {"model": str(folder), "output": str(output), "bits": bits, "group_size": group_size, "options": options}
    return output, native.run(job, silent)


@pytest.mark.parametrize(
    ("bits", "sym", "layout"),
    [(4, True, "gptq"), (4, False, "awq_gemm"), (8, False, "gptq_v2"), (3, True, "gptq"), (2, False, "gptq_v2")],
)
@pytest.mark.parametrize("group_size", [32, -1])
def test_the_layout_follows_from_symmetry_and_bits_and_holds_plain_rounding(model, bits, sym, layout, group_size):
    folder = model()
    output, result = quantize(folder, bits, group_size, sym=sym)
    assert quantization_of(output).layout == layout
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = dequantize(quantize_rtn(weights()[name].astype(np.float32), bits, group_size, sym))
    assert np.array_equal(dict(iter_dequantized(output))[name], expected)
    assert result["metrics"]["linears_quantized"] == result["metrics"]["linears_expected"] == 2


def test_embeddings_norms_routers_and_biases_stay_float_and_tied_heads_tied(model):
    output, _ = quantize(model())
    checkpoint = Checkpoint.open(output)
    floats = {name for name in checkpoint.names if name.endswith((".weight", ".bias"))}
    assert floats == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.self_attn.q_proj.bias",
    }
    assert {checkpoint.info(name).dtype for name in floats} == {"F16"}


def test_an_untied_head_is_kept(model):
    output, _ = quantize(model({**CONFIG, "tie_word_embeddings": False}))
    assert "lm_head.weight" in Checkpoint.open(output).names


def test_companions_are_copied_and_pickles_are_not(model):
    output, _ = quantize(model())
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json", "model.safetensors", "quantize_config.json", "tokenizer.json",
    ]  # fmt: skip


def test_every_layer_that_does_not_fit_is_named_before_anything_is_written(model):
    with pytest.raises(JobError, match="2 of 2 linear layers") as caught:
        quantize(model(), group_size=48)
    assert "q_proj: group_size=48 does not divide its input width 64" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits=5: rtn takes 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0"),
        ({"clip": True}, "options clip: rtn has grid, sym"),
    ],
)
def test_values_out_of_range_are_refused(model, changes, message):
    with pytest.raises(JobError, match=message):
        quantize(model(), **changes)


def test_quantized_and_empty_models_are_refused(model, tmp_path):
    quantized = model({"quantization_config": {"quant_method": "awq"}})
    job = {"model": str(quantized), "output": str(tmp_path / "out"), "bits": 4, "group_size": 32}
    with pytest.raises(JobError, match="quantized already"):
        native.run(job, silent)
    empty = tmp_path / "empty"
    empty.mkdir()
    write_safetensors(empty / "model.safetensors", {"norm.weight": np.ones(4, np.float16)})
    (empty / "config.json").write_text("{}")
    with pytest.raises(JobError, match="no linear layer was found"):
        native.run({"model": str(empty), "output": str(empty), "bits": 4, "group_size": 32}, silent)


def test_a_value_beyond_float16_is_refused_by_name(model):
    huge = {"model.layers.1.post_norm.weight": np.array([1e5], ml_dtypes.bfloat16)}
    with pytest.raises(JobError, match=r"model\.layers\.1\.post_norm\.weight has values up to 9\.984e\+04"):
        quantize(model(**huge))


def test_shards_hold_at_most_the_limit_and_the_index_names_every_tensor(tmp_path):
    tensors = {f"t{i}": np.full((10,), i, np.float16) for i in range(5)}
    _output.write_weights(tmp_path, iter(tensors.items()), limit=40)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    checkpoint = Checkpoint.open(tmp_path)
    assert all(np.array_equal(checkpoint.tensor(name), array) for name, array in tensors.items())


def test_runs_on_one_core_and_on_several_give_the_same_bytes_and_errors(model, tmp_path, monkeypatch):
    more = {f"model.layers.{number}.mlp.up_proj.weight": np.full((64, 64), number, np.float32) for number in range(9)}
    folder, contents, errors = model(**more), [], []
    for number in (1, 1, 4):
        monkeypatch.setattr(native, "tensors_at_once", lambda number=number: number)
        output = tmp_path / str(len(contents))
        output.mkdir()
        result = native.run({"model": str(folder), "output": str(output), "bits": 4, "group_size": 32}, silent)
        contents.append({path.name: path.read_bytes() for path in Path(output).iterdir()})
        errors.append(result["layers"])
    assert contents[0] == contents[1] == contents[2]
    assert errors[0] == errors[2]
    assert len(errors[0]) == 11
