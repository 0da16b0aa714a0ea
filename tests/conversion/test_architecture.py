"""The reference environment's model of config.json says which tensors a checkpoint must have."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from tiny_quantized import write_whole

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.config.convert import ConvertConfig
from quantline.conversion.architecture import LABEL, MODULE
from quantline.conversion.convert import convert
from quantline.core.errors import UserError
from quantline.toolchains.environments import ensure
from quantline.toolchains.runner import run_worker
from tests.conversion.test_structure import changed

pytestmark = pytest.mark.toolchain("reference")


@pytest.fixture(scope="module")
def ask(root, tmp_path_factory):
    toolchain, log = ensure(root, "reference"), tmp_path_factory.mktemp("log") / "log"
    return lambda job: run_worker(toolchain, MODULE, job, log=log, threads=1, label=LABEL)


def converted(folder, out, ask):
    out.mkdir(exist_ok=True)
    convert(folder, out, ConvertConfig(target="gptq"), run_worker=ask)
    return json.loads((out / "conversion_proof.json").read_text())["architecture"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_checkpoint_is_one_of_its_architecture_and_the_proof_says_so(tmp_path, ask, tied):
    source = write_whole(tmp_path / "in", "gptq_v2", tied=tied)
    entry = converted(source, tmp_path / "out", ask)
    assert entry["checked"] is True
    assert entry["by"].startswith("transformers ")
    assert entry["by"].endswith(", Qwen2ForCausalLM")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # In the only layer, so that no other layer tells.
        (
            {"name": "model.layers.0.post_attention_norm.weight"},
            "has no tensor for model.layers.0.input_layernorm.weight",
        ),
        ({"shape": [1, 128]}, r"input_layernorm.weight \(\[1, 128\], not \[128\]\)"),
    ],
)
def test_what_no_other_layer_contradicts_the_architecture_does(tmp_path, ask, changes, message):
    source = write_whole(tmp_path / "in", "gptq_v2", layers=1)
    changed(source, "model.layers.0.input_layernorm.weight", **changes)
    with pytest.raises(UserError, match=message):
        converted(source, tmp_path / "out", ask)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_architecture_that_transformers_does_not_know_is_not_refused_but_said(tmp_path, ask):
    source = write_whole(tmp_path / "in", "gptq_v2")
    config = json.loads((source / "config.json").read_text())
    config.update(model_type="brand_new", architectures=["BrandNewForCausalLM"])
    (source / "config.json").write_text(json.dumps(config))
    entry = converted(source, tmp_path / "out", ask)
    assert entry["checked"] is False
    assert "cannot build its model" in entry["note"]
    shutil.rmtree(tmp_path / "out")


def test_scales_of_an_fp8_cache_are_kept_with_the_checkpoint_and_left_out_of_another_layout(tmp_path, ask) -> None:
    source = write_whole(tmp_path / "in", "compressed_tensors", layers=1)
    whole = Checkpoint.open(source)
    tensors = {name: np.array(whole.tensor(name)) for name in whole.names}
    names = [f"model.layers.0.self_attn.{part}_scale" for part in "kv"]
    write_safetensors(source / "model.safetensors", {**tensors, **dict.fromkeys(names, np.ones(1, np.float32))})
    config = json.loads((source / "config.json").read_text())
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = cache
    (source / "config.json").write_text(json.dumps(config))
    for target in ("keep", "gptq_v2"):
        out = tmp_path / target
        out.mkdir()
        proof = convert(source, out, ConvertConfig(target=target), run_worker=ask)
        assert proof.architecture.by is not None
        kept = sorted(set(names) & set(Checkpoint.open(out).names))
        assert (kept, sorted(proof.left_out_tensors)) == ((names, []) if target == "keep" else ([], names))
