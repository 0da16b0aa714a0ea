"""The stage on models that only the reference engine can refuse."""

from __future__ import annotations

import shutil

import ml_dtypes
import numpy as np
import pytest

import stages.download
from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.core.errors import UserError
from quantline.pipeline.config import parse
from quantline.pipeline.execute import execute

pytestmark = pytest.mark.toolchain("reference")


@pytest.fixture
def checkout(root, tmp_path):
    """A folder in which a stage runs."""
    for name in ("envs", "assets", ".venvs"):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


@pytest.fixture
def model(root, tmp_path):
    """A copy of the demo model that may be spoilt."""
    return shutil.copytree(root / "assets" / "demo" / "model", tmp_path / "own" / "model")


def change(model, change_tensors):
    checkpoint = Checkpoint.open(model)
    tensors = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}
    change_tensors(tensors)
    write_safetensors(model / "model.safetensors", tensors)


def too_large(tensors):
    """Every weight is a number, but their products are none."""
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name] = np.full_like(tensors[name], ml_dtypes.finfo(tensors[name].dtype).max)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "has no tensor for model.norm.weight"),
        (lambda tensors: tensors.update(more=np.ones(3, np.float32)), "has tensors that the model does not: more"),
        (too_large, "its logits are NaN or infinite in float32"),
    ],
    ids=["missing", "left over", "overflow"],
)
def test_a_refusal_of_the_probe_names_what_was_given(checkout, composed, model, spoil, reason):
    change(model, spoil)
    config = parse(composed("model=custom", f"model.path={model}"))
    with pytest.raises(UserError) as caught:
        execute("download", stages.WORK["download"], config, checkout, ())
    assert str(caught.value).startswith(f"{model}: {reason}")
    assert not [path for path in (checkout / "scratch").rglob("*") if path.name == "model"]
