"""Checkpoints that msModelSlim itself wrote, against the float model they came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkout_paths import FIXTURES

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts import dequantize
from quantline.checkpoints.layouts.msmodelslim.files import plan, write_files
from quantline.checkpoints.layouts.msmodelslim.tensors import PACKED
from tests.checkpoints.layouts.msmodelslim.test_files import read

pytestmark = pytest.mark.skipif(not (FIXTURES / "msmodelslim").is_dir(), reason="the shared fixtures are not there")

MODES = {
    "w4a16_g64_awq_asym": (4, 64, False, 0.1),
    "w4a16_g64_awq_sym": (4, 64, True, 0.12),
    "w4a16_perchannel_gptq_sym": (4, -1, True, 0.2),
    "w8a16_g64_gptq_sym": (8, 64, True, 0.01),
}


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_real_checkpoint_means_its_float_model(mode: str) -> None:
    bits, group_size, symmetric, tolerance = MODES[mode]
    found, original = plan(FIXTURES / "msmodelslim" / mode), Checkpoint.open(FIXTURES / "float_model")
    assert (found.variant, found.refusals, found.float_linears) == ("safe_tensor", (), ("lm_head",))
    assert len(found.layers) == 2 * 7  # two blocks of q, k, v, o, gate, up and down
    assert len(found.carried) == 2 + 5 + 6  # embeddings and head, norms, biases of q, k, v
    assert sorted(found.carried) == sorted(
        name for name in original.names if name.removesuffix(".weight") not in found.layers
    )
    checkpoint = Checkpoint(found.folder, found.files, found.infos)
    for name, layer in found.layers.items():
        linear = read(found, name)
        assert (layer.bits, layer.group_size, layer.layout == PACKED, linear.symmetric) == (
            bits,
            group_size,
            False,
            symmetric,
        )
        weight = original.tensor(f"{name}.weight").astype(np.float64)
        # m3 moves a factor per input column from the norm into the linears behind it.
        norm = norm_before(name)
        if norm is not None:
            smoothed = checkpoint.tensor(found.carried[norm]).astype(np.float64)
            weight *= original.tensor(norm).astype(np.float64) / smoothed
        difference = dequantize(linear).astype(np.float64) - weight
        assert np.linalg.norm(difference) < tolerance * np.linalg.norm(weight), name


def norm_before(name: str) -> str | None:
    block, _, module = name.rpartition(".")
    if module in ("q_proj", "k_proj", "v_proj"):
        return block.replace("self_attn", "input_layernorm.weight")
    if module in ("gate_proj", "up_proj"):
        return block.replace("mlp", "post_attention_layernorm.weight")
    return None


@pytest.mark.parametrize("mode", sorted(MODES))
def test_norms_of_real_anti_outlier_checkpoints_are_found(mode: str) -> None:
    found = plan(FIXTURES / "msmodelslim" / mode)
    norms = [name for name in found.carried if "norm" in name]
    assert len(norms) == 5
    smoothed = "awq" in mode
    assert all((found.carried[name] != name) == smoothed for name in norms)
    assert len(found.dropped) == (15 if smoothed else 0)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("variant", ["safe_tensor", "ascendV1", "v1"])
def test_real_checkpoints_survive_being_written_again(tmp_path: Path, mode: str, variant: str) -> None:
    found = plan(FIXTURES / "msmodelslim" / mode)
    checkpoint = Checkpoint(found.folder, found.files, found.infos)
    floats = {name: checkpoint.tensor(source) for name, source in found.carried.items()}
    write_files(tmp_path, {name: read(found, name) for name in found.layers}, floats, variant=variant)
    again = plan(tmp_path)
    assert again.refusals == ()
    assert again.layers.keys() == found.layers.keys()
    for name in found.layers:
        assert np.array_equal(dequantize(read(again, name)), dequantize(read(found, name)))
