from __future__ import annotations

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.linears import linear_shapes, select_linears
from quantline.core.errors import UserError
from quantline.quantization.quantize import check_group_size


@pytest.fixture(scope="module")
def model(root):
    return root / "assets" / "demo" / "model"


def write(folder, **shapes):
    tensors = {f"model.layers.0.{name}.weight": np.zeros(shape, np.float16) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def check(folder, group_size):
    checkpoint = Checkpoint.open(folder)
    check_group_size(linear_shapes(checkpoint), select_linears(checkpoint, {}, bits=4, group_size=group_size))


def test_the_linears_of_a_model_are_those_of_its_layers(model):
    shapes = linear_shapes(Checkpoint.open(model))
    assert len(shapes) == 35
    assert {width for width, _ in shapes.values()} >= {384}
    assert not [name for name in shapes if "embed" in name or "norm" in name or "lm_head" in name]


def test_a_group_size_that_does_not_divide_names_the_layer_and_those_that_do(tmp_path):
    write(tmp_path, up=(16, 192), down=(8, 128))
    with pytest.raises(UserError, match=r"group_size=128: .* 1 linears \(first: model\.layers\.0\.up, 192\)") as caught:
        check(tmp_path, 128)
    assert str(caught.value).endswith("group_size=32 or 64 divides them all")
    check(tmp_path, 64)
    check(tmp_path, -1)


def test_where_no_group_size_divides_a_scale_for_each_channel_is_advised(tmp_path):
    write(tmp_path, up=(16, 100))
    with pytest.raises(UserError, match="try group_size=-1"):
        check(tmp_path, 32)
