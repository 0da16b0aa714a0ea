"""A layout that is read as weights, added in one place: reading, planning and conversion need no other edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers, write_safetensors
from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import LAYOUTS
from quantline.checkpoints.layouts.description import QuantizationInfo
from quantline.checkpoints.layouts.layout import ConfigSection, Layout, bits_faults
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.layouts.registry import CONFIG_SECTIONS
from quantline.checkpoints.safetensors_stream import TensorSpec
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.core.errors import CheckpointError, UserError
from quantline.planning import checkpoint_memory, layouts
from quantline.quantization.file_checks import inspect

TABLE = np.linspace(-1, 1, 256, dtype=np.float32) ** 3  # an uneven grid


def dequantize(tensors: Any, *, bits: int, group_size: int) -> Any:
    return TABLE[tensors["index"]] * tensors["scale"].astype(np.float32)[:, None]


TOY = Layout(
    name="toy",
    method="toy",
    tensors={"index": True, "scale": True, "bias": False},
    codes="index",
    scales=("scale",),
    specs=lambda shape, _spec, _storage: {
        "index": TensorSpec("U8", (shape[1], shape[0])), "scale": TensorSpec("F16", (shape[1],))
    },
    shape=lambda tensors, _bits: (tensors["index"].shape[1], tensors["index"].shape[0]),
    faults=lambda _shape, spec, _storage: bits_faults("toy", (8,), spec),
    dequantize=dequantize,
    config=ConfigSection(
        lambda wanted: {"quant_method": "toy", "bits": wanted.main.bits},
        lambda _path, config: QuantizationInfo("toy", "toy", config["bits"], -1, False, True, ()),
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "toy", TOY)  # type: ignore[arg-type]
    monkeypatch.setitem(CONFIG_SECTIONS, "toy", TOY.config)  # type: ignore[arg-type]


NAME = "model.layers.0.mlp.up_proj"
INDEX = np.random.default_rng(0).integers(0, 256, (32, 64)).astype(np.uint8)
NORM = np.ones(64, np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy").mkdir()
    scale = np.arange(1, 33).astype(np.float16)
    tensors = {f"{NAME}.index": INDEX, f"{NAME}.scale": scale, "model.norm.weight": NORM}
    write_safetensors(tmp_path / "toy" / "model.safetensors", tensors)
    (tmp_path / "toy" / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "toy", "bits": 8}})
    )
    return tmp_path / "toy"


def test_it_is_read(folder: Path) -> None:
    found = dict(iter_dequantized(folder))
    assert set(found) == {f"{NAME}.weight", "model.norm.weight"}
    assert np.array_equal(found[f"{NAME}.weight"][3], TABLE[INDEX[3]] * 4)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"up_proj is packed, but config\.json says float"):
        quantized_layers(Checkpoint.open(folder), quantization_of(folder))


def test_it_is_planned_and_inspected(folder: Path, tmp_path: Path) -> None:
    floats = tmp_path / "float"
    floats.mkdir()
    write_safetensors(
        floats / "model.safetensors", {f"{NAME}.weight": np.ones((32, 64), np.float16), "model.norm.weight": NORM}
    )
    (floats / "config.json").write_text("{}")
    specs = {NAME: LinearSpec(8, -1)}
    planned = checkpoint_memory.weights_of(Checkpoint.open(floats), {}, specs, "toy", layouts.Storage())
    made = Checkpoint.open(folder)
    assert planned.total == sum(made.info(name).nbytes for name in made.names)
    assert layouts.faults("toy", {NAME: (64, 32)}, {NAME: LinearSpec(4, -1)}) == [
        f"{NAME} has 4 bits, but toy supports 8"
    ]
    assert layouts.conversion_faults("toy", "gptq", specs) == ["holds codes on a grid, but toy has none"]
    checked = inspect(floats, folder, [NAME])
    assert checked.faults == []
    assert (checked.scales, checked.linears) == (32, {NAME: (64, 32)})


def test_it_is_kept_and_not_converted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    proof = convert(folder, tmp_path / "out", ConvertConfig(target="auto"))
    assert (proof.target, proof.rewritten, [linear.name for linear in proof.linears]) == ("toy", False, [NAME])
    with pytest.raises(UserError, match="toy's weights have no codes on a grid"):
        convert(folder, tmp_path / "out", ConvertConfig(target="gptq"))
