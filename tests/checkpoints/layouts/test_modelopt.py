"""ModelOpt's checkpoints: read by their own description, exactly, and kept by a conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import LAYOUTS, FormatError
from quantline.checkpoints.layouts import float_codes as codes
from quantline.checkpoints.quantization_config import describe, quantization_of
from quantline.checkpoints.safetensors_file import numpy_dtype, write_safetensors
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.core.errors import CheckpointError
from quantline.serving.rules import Target, checkpoint_facts, verdict

F8 = numpy_dtype("F8_E4M3")


def linear(algorithm: str, rows: int, columns: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    scale = np.float32(random.uniform(0.5, 2))
    finite = np.delete(np.arange(256), [127, 255]).astype(np.uint8)
    if algorithm == "FP8":
        weight = random.choice(finite, (rows, columns)).view(F8)
        return {"weight": weight, "weight_scale": scale.reshape(()), "input_scale": np.float32(0.5).reshape(())}
    return {
        "weight": random.integers(0, 256, (rows, columns // 2)).astype(np.uint8),
        "weight_scale": random.choice(finite[:127], (rows, columns // 16)).view(F8),
        "weight_scale_2": scale.reshape(()), "input_scale": np.float32(0.25).reshape(()),
    }  # fmt: skip


def written(folder: Path, algorithm: str, *, inside: bool = False, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    own = {"quant_algo": algorithm, "kv_cache_quant_algo": None, **changes}
    if algorithm == "NVFP4":
        own = {"group_size": 16, **own}
    config: dict[str, Any] = {"model_type": "qwen2", "num_attention_heads": 2}
    if inside:
        config["quantization_config"] = {"quant_method": "modelopt", "ignore": ["lm_head"], **own}
    else:
        described = {"producer": {"name": "modelopt"}, "quantization": {**own, "exclude_modules": ["lm_head"]}}
        (folder / "hf_quant_config.json").write_text(json.dumps(described))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"m.0.{suffix}": array for suffix, array in linear(algorithm, 32, 64).items()}
    # Those of an FP8 cache, beside a quantized linear and a float one.
    scale = {"m.0.k_scale": np.ones((), np.float32), "m.1.self_attn.k_proj.k_scale": np.ones((), np.float32)}
    write_safetensors(folder / "model.safetensors", {**tensors, **scale, "m.norm.weight": np.ones(64, np.float16)})
    return folder


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("algorithm", "bits", "group"), [("FP8", 8, -1), ("NVFP4", 4, 16)])
def test_a_folder_is_read_by_either_description(tmp_path, algorithm, bits, group, inside):
    folder = written(tmp_path / "in", algorithm, inside=inside)
    info = quantization_of(folder)
    assert (info.method, info.bits, info.group_size, info.modules_to_not_convert) == (
        "modelopt",
        bits,
        group,
        ("lm_head",),
    )
    assert (info.activations.tensor, info.activation_bits) == ("input_scale", bits)
    found = dict(iter_dequantized(folder))
    assert sorted(found) == ["m.0.weight", "m.norm.weight"]
    assert found["m.0.weight"].shape == (32, 64)
    cpu = Target("vllm", "0.32.0", "cpu", "bfloat16")
    assert verdict(cpu, checkpoint_facts(folder)).rule_id == "modelopt-cpu"
    assert verdict(Target("vllm", "0.32.0", "cuda", "bfloat16"), checkpoint_facts(folder)).supported
    (tmp_path / "out").mkdir()
    proof = convert(folder, tmp_path / "out", ConvertConfig(target="auto"))
    assert (proof.rewritten, proof.counts["linears"]) == (False, 1)
    assert np.array_equal(dict(iter_dequantized(tmp_path / "out"))["m.0.weight"], found["m.0.weight"])


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 999))
def test_a_scale_is_multiplied_where_compressed_tensors_divides(rows: int, groups: int, seed: int) -> None:
    tensors = linear("NVFP4", rows, 16 * groups, seed)
    ours = LAYOUTS["modelopt_nvfp4"].dequantize(tensors, bits=4, group_size=16)
    outer = float(tensors["weight_scale_2"])
    theirs = {
        "weight_packed": tensors["weight"], "weight_scale": tensors["weight_scale"],
        "weight_global_scale": np.array([1 / outer], np.float32),
    }  # fmt: skip
    other = LAYOUTS["compressed_tensors_nvfp4a16"].dequantize(theirs, bits=4, group_size=16)
    np.testing.assert_allclose(ours, other, rtol=3e-7)
    row, column = rows - 1, 16 * groups - 1
    code = int(tensors["weight"][row, column // 2]) >> 4
    scale = float(codes.E4M3[tensors["weight_scale"].view(np.uint8)[row, groups - 1]])
    assert ours[row, column] == pytest.approx(float(codes.E2M1[code]) * scale * outer, rel=3e-7)


def test_what_is_not_known_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="quant_algo 'W4A8_AWQ': known are FP8, NVFP4"):
        quantization_of(written(tmp_path / "a", "FP8", quant_algo="W4A8_AWQ"))
    with pytest.raises(CheckpointError, match="groups of 32"):
        quantization_of(written(tmp_path / "b", "NVFP4", group_size=32))
    with pytest.raises(CheckpointError, match="not written; use compressed_tensors"):
        describe("modelopt_fp8", bits=8, group_size=-1, symmetric=True)
    tensors = {**linear("FP8", 4, 16), "weight_scale": np.zeros((), np.float32)}
    with pytest.raises(FormatError, match="must be one positive number"):
        LAYOUTS["modelopt_fp8"].dequantize(tensors, bits=8, group_size=-1)
