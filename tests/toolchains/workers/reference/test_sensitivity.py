"""Each probe beside the whole model with that unit rounded, and what cannot be measured."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.layouts import dequantize, quantize_rtn
from quantline.core.errors import UserError
from quantline.serving.checkpoint_facts import units_of
from quantline.toolchains import runner
from quantline.toolchains.environments import ensure
from quantline.toolchains.toolchain import worker_environment

pytestmark = pytest.mark.toolchain("reference")
MODULE = "quantline.toolchains.workers.reference.sensitivity"
LINEARS = [f"model.layers.{layer}.{name}" for layer in (0, 3) for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")]  # fmt: skip

KL = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
from safetensors.numpy import load_file
ids = torch.from_numpy(load_file(sys.argv[1])["input_ids"][:2].astype(np.int64))
def logs(folder):
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(ids).logits.double().log_softmax(-1)
base = logs(sys.argv[2])
print(json.dumps([float((base.exp() * (base - logs(folder))).sum(-1).mean()) for folder in sys.argv[3:]]))
"""


@pytest.fixture(scope="module")
def place(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    model = shutil.copytree(root / "assets/demo/model", folder / "model")
    ids = np.random.default_rng(0).integers(5, 2000, (3, 24), dtype=np.int32)
    write_safetensors(folder / "tokens.safetensors", {"input_ids": ids})
    return folder, model


@pytest.fixture(scope="module")
def measured(root, place):
    folder, _ = place
    toolchain = ensure(root, "reference", platform="cpu")

    def run(model, linears=LINEARS):
        grids = [{"bits": bits, "group_size": 64, "symmetric": sym} for bits, sym in ((2, True), (4, False))]
        job = {
            "model": str(model), "units": units_of(linears), "grids": grids, "samples": 2, "device": "cpu", "threads": 1,
            "calibration": str(folder / "tokens.safetensors"),
        }  # fmt: skip
        return runner.run_worker(toolchain, MODULE, job, log=folder / "log", threads=1, label="probe").data

    return run


def test_a_probe_is_the_whole_model_with_that_unit_rounded(root, place, measured):
    folder, model = place
    tensors, folders = dict(load_file(model / "model.safetensors")), []
    rows = measured(model)["rows"]
    assert len(rows) == 4 * 2
    for number, row in enumerate(rows):
        changed = dict(tensors)
        for name in units_of(LINEARS)[row["unit"]]:
            weight = np.asarray(tensors[f"{name}.weight"], np.float32)
            linear = quantize_rtn(weight, row["bits"], 64, row["bits"] == 2)
            changed[f"{name}.weight"] = dequantize(linear).astype(np.float32)
        folders.append(folder / f"rounded{number}")
        shutil.copytree(model, folders[-1], ignore=shutil.ignore_patterns("*.safetensors"))
        write_safetensors(folders[-1] / "model.safetensors", changed)
    done = subprocess.run(
        [ensure(root, "reference").python, "-c", KL, folder / "tokens.safetensors", model, *folders],
        env=worker_environment(1), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row, expected in zip(rows, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert row["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-9), row
    assert all(row["kl"] > 0 for row in rows)


def test_a_unit_whose_output_goes_nowhere_or_that_is_in_no_part_is_an_error(place, measured, tmp_path):
    _, model = place
    tensors = dict(load_file(model / "model.safetensors"))
    dead = shutil.copytree(model, tmp_path / "dead", ignore=shutil.ignore_patterns("*.safetensors"))
    own = "model.layers.0.self_attn.o_proj.weight"
    write_safetensors(dead / "model.safetensors", {**tensors, own: np.zeros_like(tensors[own])})
    with pytest.raises(UserError, match=r"q_proj\+k_proj\+v_proj: at 2 bits nothing changes"):
        measured(dead)
