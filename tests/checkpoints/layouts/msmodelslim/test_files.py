from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linear_strategies import build

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts import AffineLinear
from quantline.checkpoints.layouts.folder import FolderContents
from quantline.checkpoints.layouts.msmodelslim import codec, files
from quantline.checkpoints.layouts.msmodelslim.files import plan, recognises, write_files
from quantline.checkpoints.layouts.msmodelslim.tensors import PACKED
from quantline.checkpoints.safetensors_file import write_safetensors
from quantline.core.errors import CheckpointError

FLOATS = {
    "model.embed_tokens.weight": np.ones((10, 64), np.float16),
    "lm_head.weight": np.ones((10, 64), np.float16),
    "model.norm.weight": np.ones(64, np.float16),
    "a.q_proj.bias": np.arange(32, dtype=np.float16),
}


def layers(group_size: int = 32) -> dict[str, AffineLinear]:
    return {"a.q_proj": build(4, 64, 32, group_size, 1), "a.o_proj": build(8, 64, 64, -1, 2)}


def read(found: FolderContents, name: str) -> AffineLinear:
    layer = found.layers[name]
    checkpoint = Checkpoint(found.folder, found.files, found.infos)
    tensors = {suffix: checkpoint.tensor(tensor) for suffix, tensor in layer.tensors.items()}
    return codec.read(tensors, bits=layer.bits, group_size=layer.group_size, packed=layer.layout == PACKED)


def description(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = next(folder.glob("quant_model_description*.json"))
    return path, json.loads(path.read_text())


def change(folder: Path, remove: tuple[str, ...] = (), **entries: Any) -> None:
    path, content = description(folder)
    content = {key: value for key, value in {**content, **entries}.items() if key not in remove}
    path.write_text(json.dumps(content))


def refusals(folder: Path) -> list[str]:
    return [str(fault) for fault in plan(folder).refusals]


@pytest.mark.parametrize("variant", ["safe_tensor", "ascendV1", "v1"])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_save_mode_reads_back(tmp_path: Path, variant: str, group_size: int, shards: int) -> None:
    write_files(tmp_path, layers(group_size), FLOATS, variant=variant, shards=shards)
    assert recognises(tmp_path)
    found = plan(tmp_path)
    assert (found.variant, found.refusals, found.dropped) == (variant, (), {})
    assert {name: (layer.bits, layer.group_size, layer.layout == PACKED) for name, layer in found.layers.items()} == {
        "a.o_proj": (8, -1, False),
        "a.q_proj": (4, group_size, variant == "ascendV1"),
    }
    assert found.carried == {name: name for name in sorted(FLOATS)}
    assert found.float_linears == ("lm_head",)
    assert len(set(found.files.values())) == shards
    for name, linear in layers(group_size).items():
        again = read(found, name)
        assert np.array_equal(again.codes, linear.codes)
        assert np.array_equal(again.zeros, linear.zeros)
        assert np.array_equal(again.scales, linear.scales)


def test_file_names_are_those_of_the_save_modes(tmp_path: Path) -> None:
    expected = {
        ("safe_tensor", 1): {"quant_model_description_w4a16.json", "quant_model_weight_w4a16.safetensors"},
        ("ascendV1", 1): {"quant_model_description.json", "quant_model_weight_w4a16.safetensors"},
        ("v1", 1): {
            "quant_model_description.json",
            "quant_model_weights-00001-of-00001.safetensors",
            "quant_model_weights.safetensors.index.json",
        },
        ("safe_tensor", 2): {
            "quant_model_description_w4a16.json",
            "quant_model_weight_w4a16-00001-of-00002.safetensors",
            "quant_model_weight_w4a16-00002-of-00002.safetensors",
            "quant_model_weight_w4a16.safetensors.index.json",
        },
    }
    for (variant, shards), names in expected.items():
        folder = tmp_path / f"{variant}{shards}"
        folder.mkdir()
        write_files(folder, layers(), FLOATS, variant=variant, shards=shards)
        assert {path.name for path in folder.iterdir()} == names
        assert ("version" in description(folder)[1]) == (variant != "safe_tensor")


def test_top_level_keys_and_other_values_are_no_tensors(tmp_path: Path) -> None:
    write_files(tmp_path, layers(), FLOATS)
    change(tmp_path, metadata={"quarot": None}, group_size=32, optional=[], is_fine=True, kv_cache_type=None)
    assert plan(tmp_path).refusals == ()


def test_tensors_that_the_description_does_not_name_are_kept(tmp_path: Path) -> None:
    write_files(tmp_path, layers(), FLOATS)
    undescribed = ("lm_head.weight", "model.norm.weight", "a.q_proj.weight_scale")
    change(tmp_path, remove=undescribed)
    found = plan(tmp_path)
    assert found.refusals == ()
    assert set(found.carried) == set(FLOATS)
    assert len(found.layers) == 2
    change(tmp_path, remove=tuple(f"a.q_proj.{suffix}" for suffix in ("weight", "weight_scale", "weight_offset")))
    assert plan(tmp_path).layers["a.q_proj"].bits == 4  # by model_quant_type


def test_a_packed_layer_without_description_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, layers(), FLOATS, variant="ascendV1")
    change(tmp_path, remove=tuple(f"a.q_proj.{suffix}" for suffix in ("weight", "weight_scale", "weight_offset")))
    assert refusals(tmp_path) == [
        "a.q_proj.weight: has two codes per byte, but the description does not name it: "
        "add it to quant_model_description.json"
    ]


def norms(bias: float) -> dict[str, np.ndarray]:
    vector = np.arange(64, dtype=np.float32)
    return {
        "n.weight": vector,
        "n.bias": np.full(64, bias, np.float32),
        "n.module.weight": vector,
        "n.module.bias": np.full(64, bias, np.float32),
    }


def test_norms_of_m3_come_from_the_wrapped_module_and_zero_biases_go(tmp_path: Path) -> None:
    write_files(tmp_path, layers(), {**FLOATS, **norms(0)})
    change(tmp_path, **{"n.module.weight": "W4A16", "n.module.bias": "W4A16"})
    found = plan(tmp_path)
    assert found.refusals == ()
    assert found.carried["n.weight"] == "n.module.weight"
    assert "n.module.weight" not in found.carried
    assert sorted(found.dropped) == ["n.bias", "n.module.bias", "n.weight"]


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    write_files(tmp_path, layers(), {**FLOATS, "n.weight": np.ones(4, np.float16), "n.bias": np.ones(4, np.float16)})
    stored = {name: value.copy() for name, value in all_tensors(tmp_path).items()}
    stored["b.weight"] = np.zeros((8, 8), np.int8)
    stored["b.deq_scale"] = np.zeros(8, np.int64)
    stored["c.weight_scale"] = np.ones((8, 1), np.float32)
    stored["d.weight"] = np.ones((8, 8), np.float16)
    del stored["a.q_proj.weight_offset"]
    stored["a.o_proj.weight_offset"] = np.zeros((64, 2), np.float16)
    write_safetensors(tmp_path / "quant_model_weight_w4a16.safetensors", stored)
    change(tmp_path, **{"b.weight": "W8A8", "b.deq_scale": "W8A8", "d.weight": "W4A16", "e.weight": "W8A16"})
    change(tmp_path, **{"k.kv_cache_scale": 3})
    found = refusals(tmp_path)
    starts = [
        "a.o_proj: a.o_proj.weight is I8 (64, 64), a.o_proj.weight_scale is F16 (64, 1), a.o_proj.weight_offset is",
        "a.q_proj: is quantized, but lacks a.q_proj.weight_offset",
        "b.weight: has the scheme 'W8A8'; supported are W4A16, W8A16 and FLOAT",
        "c: is quantized, but lacks c.weight, c.weight_offset",
        "d.weight: is described as 'W4A16' but stored as F16 (8, 8)",
        "n.bias: is the bias of a norm and not zero (largest magnitude 1)",
        "e.weight: is described as W8A16 in quant_model_description_w4a16.json, but is in no weights file",
    ]
    assert len(found) == len(starts)
    for fault, start in zip(found, starts, strict=True):
        assert fault.startswith(start)


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    found = plan(folder)
    checkpoint = Checkpoint(folder, found.files, found.infos)
    return {name: checkpoint.tensor(name) for name in found.files}


@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "FLOAT"])
def test_unknown_schemes_of_quantized_tensors_are_refused(tmp_path: Path, scheme: Any) -> None:
    write_files(tmp_path, layers(), FLOATS)
    change(tmp_path, **{f"a.q_proj.{suffix}": scheme for suffix in ("weight", "weight_scale", "weight_offset")})
    assert refusals(tmp_path)[0].startswith(f"a.q_proj.weight: has the scheme {scheme!r}; supported are")


@pytest.mark.parametrize("scheme", [4, None, ["W4A16"], {"scheme": "W4A16"}])
@pytest.mark.parametrize("key", ["model_quant_type", "a.q_proj.weight", "a.norm.weight", "gone.weight"])
def test_a_scheme_that_is_no_string_is_refused_with_its_key(tmp_path: Path, key: str, scheme: Any) -> None:
    write_files(tmp_path, layers(), FLOATS)
    change(tmp_path, **{key: scheme})
    with pytest.raises(CheckpointError, match=f"{re.escape(key)} is .*: it must be a scheme such as W8A16 or FLOAT"):
        plan(tmp_path)


def test_partners_described_otherwise_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, layers(), FLOATS)
    change(tmp_path, **{"a.q_proj.weight_scale": "W8A16"})
    assert "described as ['W4A16', 'W8A16', 'W4A16']" in refusals(tmp_path)[0]


def test_a_tied_head_may_be_described_and_not_stored(tmp_path: Path) -> None:
    write_files(tmp_path, layers(), {name: value for name, value in FLOATS.items() if name != "lm_head.weight"})
    change(tmp_path, **{"lm_head.weight": "FLOAT"})
    assert refusals(tmp_path) == []


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        plan(tmp_path / "nothing")
    assert not recognises(tmp_path)
    with pytest.raises(CheckpointError, match="has no msModelSlim description"):
        plan(tmp_path)
    write_files(tmp_path, layers(), FLOATS)
    path, _ = description(tmp_path)
    kept = path.read_text()
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        plan(tmp_path)
    path.write_text(kept)
    shutil.copy(path, tmp_path / "quant_model_description_w8a16.json")
    with pytest.raises(CheckpointError, match="more than one description"):
        plan(tmp_path)
    (tmp_path / "quant_model_description_w8a16.json").unlink()
    (tmp_path / "quant_model_weight_w4a16.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no msModelSlim weights file"):
        plan(tmp_path)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/x", "..", "", "a\\b"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    write_files(tmp_path, layers(), FLOATS, shards=2)
    index = tmp_path / "quant_model_weight_w4a16.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is no file inside its folder"):
        plan(tmp_path)


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, layers(), FLOATS, shards=2)
    index = tmp_path / "quant_model_weight_w4a16.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"does not list lm_head\.weight"):
        plan(tmp_path)
    (tmp_path / "quant_model_weight_w4a16-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        plan(tmp_path)


def test_writing_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="given twice"):
        write_files(tmp_path, layers(), {"a.q_proj.weight": np.ones(1, np.float16)})
    with pytest.raises(CheckpointError, match="variant='v2'"):
        write_files(tmp_path, {}, {}, variant="v2")


def test_the_save_modes_have_names() -> None:
    assert (files.SAFE_TENSOR, files.ASCEND_V1, files.V1) == (
        "safe_tensor",
        "ascendV1",
        "v1",
    )
