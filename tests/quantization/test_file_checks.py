from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from tiny_quantized import LAYER, write_float, write_quantized

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.linears import select_linears
from quantline.quantization.file_checks import inspect


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The float model, and what each layout makes of it."""
    folder = tmp_path_factory.mktemp("models")
    write_float(folder / "float")
    for layout, settings in (("gptq", {}), ("awq_gemm", {"sym": False}), ("compressed_tensors", {}), ("w8a8", {})):
        write_quantized(folder / layout, layout, **settings)
    return folder


@pytest.fixture(scope="module")
def names(models):
    return list(select_linears(Checkpoint.open(models / "float"), {}, bits=4, group_size=128))


@pytest.fixture
def damaged(models, tmp_path):
    """A copy of the GPTQ checkpoint whose tensors pass through a function."""

    def make(change):
        folder = tmp_path / "damaged"
        shutil.copytree(models / "gptq", folder)
        checkpoint = Checkpoint.open(models / "gptq")
        tensors = {name: checkpoint.tensor(name).copy() for name in checkpoint.names}
        change(tensors)
        write_safetensors(folder / "model.safetensors", tensors)
        return folder

    return make


@pytest.mark.parametrize("layout", ["gptq", "awq_gemm", "compressed_tensors", "w8a8"])
def test_a_whole_checkpoint_has_no_fault(models, names, layout):
    found = inspect(models / "float", models / layout, names)
    assert found.faults == found.warnings == []
    assert list(found.linears) == sorted(names)
    assert found.linears[f"{LAYER}mlp.down_proj"] == (512, 256)
    assert (found.zero_scales, found.scales > 0) == (0, True)


def test_effective_bits_count_scales_zero_points_and_indexes(models, names):
    gptq, awq = (inspect(models / "float", models / layout, names) for layout in ("gptq", "awq_gemm"))
    # 16 bits of scale and 4 of zero point for 128 weights; GPTQ names the group of every input, 32 bits for a column.
    assert awq.effective_bits == 4 + 20 / 128
    columns = sum(wide for wide, _ in gptq.linears.values())
    assert gptq.effective_bits == pytest.approx(4 + 20 / 128 + 32 * columns / gptq.quantized_weights)
    assert awq.effective_bits < awq.bits / awq.weights < 16


def test_a_model_that_was_not_quantized_is_a_fault(models, names):
    assert inspect(models / "float", models / "float", names).faults == [
        "nothing was quantized: every weight is unchanged"
    ]


def test_a_linear_left_in_float_is_a_fault(models, names, tmp_path):
    write_quantized(tmp_path / "part", "gptq", skip=["self_attn.k_proj"])
    found = inspect(models / "float", tmp_path / "part", names)
    assert found.faults == [f"1 of 7 linears were not quantized: {LAYER}self_attn.k_proj"]


def test_a_linear_that_should_have_stayed_float_is_a_fault(models, names):
    found = inspect(models / "float", models / "gptq", names[1:])
    assert found.faults == [f"1 linears were quantized but should have stayed float: {names[0]}"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_no_number_is_a_fault(models, names, damaged, value):
    folder = damaged(lambda tensors: tensors[f"{LAYER}mlp.up_proj.scales"].__setitem__((0, 5), value))
    found = inspect(models / "float", folder, names)
    assert found.faults == [f"scales are NaN or infinite in 1 linears: {LAYER}mlp.up_proj"]


def test_scales_that_are_all_zero_are_a_fault(models, names, damaged):
    folder = damaged(lambda tensors: tensors[f"{LAYER}mlp.up_proj.scales"].fill(0))
    (fault,) = inspect(models / "float", folder, names).faults
    assert "all scales, and so all weights, are zero" in fault
    assert fault.endswith(f"{LAYER}mlp.up_proj")


def test_a_few_zero_scales_are_counted(models, names, damaged):
    folder = damaged(lambda tensors: tensors[f"{LAYER}mlp.up_proj.scales"].__setitem__((0, slice(3)), 0))
    found = inspect(models / "float", folder, names)
    assert (found.faults, found.zero_scales) == ([], 3)
    assert found.warnings == [f"3 of {found.scales} scales, and so their weights, are zero in {LAYER}mlp.up_proj"]


def test_files_and_tensors_that_are_missing_are_all_named(models, names, damaged):
    folder = damaged(lambda tensors: tensors.pop("model.norm.weight"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("")
    assert inspect(models / "float", folder, names).faults == [
        "tokenizer.json: missing, although the float model has it",
        "tokenizer_config.json: empty",
        "1 tensors of the float model are missing: model.norm.weight",
    ]


def test_a_shard_that_is_missing_or_cut_off_is_a_fault(models, names, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(models / "gptq", folder)
    checkpoint = Checkpoint.open(models / "gptq")
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names if name != "model.norm.weight"}
    write_safetensors(folder / "model-00001-of-00002.safetensors", tensors)
    (folder / "model.safetensors").unlink()
    where = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    where["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (fault,) = inspect(models / "float", folder, names).faults
    assert "model-00002-of-00002.safetensors" in fault
    shutil.copytree(models / "gptq", tmp_path / "cut")
    with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    (fault,) = inspect(models / "float", tmp_path / "cut", names).faults
    assert "model.safetensors" in fault


def test_what_a_quantizer_was_not_asked_for_is_counted_unless_a_rule_leaves_it_float(models, names, tmp_path):
    # The list that the quantizer got lacks the same linear as its output: only the model itself tells.
    write_quantized(tmp_path / "part", "gptq", skip=["mlp.down_proj"])
    asked = [name for name in names if not name.endswith("down_proj")]
    found = inspect(models / "float", tmp_path / "part", asked)
    assert found.faults == [
        f"1 weights of the decoder layers stayed float, although no rule says so: {LAYER}mlp.down_proj"
    ]
    assert found.expected == len(names)
    allowed = inspect(models / "float", tmp_path / "part", asked, [{"match": "*.down_proj", "skip": True}])
    assert (allowed.faults, allowed.expected) == ([], len(asked))


@pytest.mark.parametrize("shape", [(64, 64), (8, 64, 64)])
def test_weights_of_a_layer_in_any_form_count(models, names, tmp_path, shape):
    model, output = tmp_path / "model", tmp_path / "output"
    for source, folder in ((models / "float", model), (models / "gptq", output)):
        shutil.copytree(source, folder)
        tensors = {name: Checkpoint.open(source).tensor(name).copy() for name in Checkpoint.open(source).names}
        tensors[f"{LAYER}mlp.experts.gate_up_proj"] = np.ones(shape, np.float16)
        write_safetensors(folder / "model.safetensors", tensors)
    (fault,) = inspect(model, output, names).faults
    assert fault.endswith(f"although no rule says so: {LAYER}mlp.experts.gate_up_proj")


@pytest.mark.parametrize("name", ["mlp.switch", "mlp.switch.inner"])
def test_a_quantized_router_is_found_by_its_shape_whatever_it_is_called(models, names, tmp_path, name):
    def moe(folder, source, rename):
        shutil.copytree(source, folder)
        tensors = {key: Checkpoint.open(source).tensor(key).copy() for key in Checkpoint.open(source).names}
        old = f"{LAYER}mlp.gate_proj"  # 512 outputs, one for each expert
        tensors = {key.replace(old, LAYER + rename): value for key, value in tensors.items()}
        tensors = {key.replace("mlp.up_proj", "mlp.experts.0.up_proj"): value for key, value in tensors.items()}
        write_safetensors(folder / "model.safetensors", tensors)
        return folder

    model = moe(tmp_path / "model", models / "float", name)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts": 512}))
    output = moe(tmp_path / "output", models / "gptq", name)
    asked = [LAYER + name, *(one.replace("mlp.up_proj", "mlp.experts.0.up_proj") for one in names if "gate" not in one)]
    assert inspect(model, output, asked).faults == [f"1 routers were quantized: {LAYER}{name}"]
