"""Several models in one repository, through the real DVC: what is built, what runs again, and that hashes are the same."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from checkout import copy_checkout

pytestmark = [pytest.mark.e2e, pytest.mark.toolchain("reference")]
SHARED = "calibration=demo calibration.n_samples=2 calibration.seq_len=64"
SECOND = "model=custom model.path=local/second"
ONE = f"shared: {SHARED} {SECOND}\nbaseline: method=float\nvariants:\n  w4: method=rtn bits=4\n"
TWO = (
    f"shared: {SHARED}\nbaseline: method=float\nmodels:\n  demo: model=demo\n  second: {SECOND}\n"
    "variants:\n  w4: method=rtn bits=4\n"
)
BUILT = ("quantize@demo-w4", "quantize@second-w4")


def disturb(folder):
    """Change the weights of a copy of the demo model a little, so that it is another one."""
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + length])["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    place = slice(8 + length + begin, 8 + length + end)
    bits = np.frombuffer(bytes(raw[place]), "<u2").astype(np.uint32) << 16
    weights = bits.view(np.float32) * np.float32(1.5)
    raw[place] = (weights.view(np.uint32) >> 16).astype("<u2").tobytes()
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def copies(tmp_path_factory, root):
    """A checkout of two models, and one of the second of them alone."""
    found = []
    for name, params in (("two", TWO), ("one", ONE)):
        copy = copy_checkout(root, tmp_path_factory.mktemp(name) / "copy")
        shutil.copytree(root / "assets" / "demo" / "model", copy.root / "local" / "second")
        disturb(copy.root / "local" / "second")
        (copy.root / "params.yaml").write_text(params)
        found.append(copy)
    return found


def ran(done):
    assert done.code == 0, done.text
    return [name for name in re.findall(r"Running stage '([^']+)'", done.out) if name not in ("code", "inputs")]


def test_two_models_are_built_beside_each_other_as_each_is_alone(copies):
    two, one = copies
    refused = two.dvc("repro", *[name.replace("demo-", "") for name in BUILT[:1]])
    assert (
        "dvc.yaml is for one model, and params.yaml for every variant of every model; run `python -m stages.models`"
        in (refused.text)
    )
    changed = two.run("python", "-m", "stages.models")
    assert changed.out == "dvc.yaml: now for 2 models (demo, second), 2 pairs\n", changed.text
    assert set(ran(two.dvc("repro", *BUILT))) >= {*BUILT, "download@demo", "download@second", "calibrate@demo-w4"}
    assert ran(two.dvc("repro", *BUILT)) == []
    ran(one.dvc("repro", "quantize@w4"))
    for stage in ("calibrate", "quantize"):
        here, alone = two.result("second/w4", stage), one.result("w4", stage)
        for key in ("fingerprint", "output_hash", "outputs", "tensors"):
            assert here[key] == alone[key], (stage, key)
    assert two.result("second/shared", "download")["outputs"] == one.result("shared", "download")["outputs"]
    assert two.result("demo/w4", "quantize")["output_hash"] != two.result("second/w4", "quantize")["output_hash"]


def test_a_changed_line_of_a_model_reruns_that_model_alone(copies):
    two, _ = copies
    params = two.root / "params.yaml"
    params.write_text(TWO.replace(SECOND, f"{SECOND} calibration.seed=5"))
    again = ran(two.dvc("repro", *BUILT))
    assert "calibrate@second-w4" in again
    assert all("second" in name for name in again), again
    params.write_text(TWO)
    assert all("compose" in name or "calibrate@second" in name or "quantize@second" in name
               for name in ran(two.dvc("repro", *BUILT)))  # fmt: skip


def test_named_pairs_and_commands_by_the_whole_name(copies):
    two, _ = copies
    params = two.root / "params.yaml"
    params.write_text(TWO + "  w8: method=rtn bits=8\npairs: [demo/w4, second/w4, second/w8]\n")
    refused = two.dvc("repro", *BUILT)
    assert "dvc.yaml is for every variant of every model, and params.yaml for named pairs" in refused.text
    assert two.run("python", "-m", "stages.models").code == 0
    assert ran(two.dvc("repro", *BUILT)) == ["compose@second-w8"]
    listed = two.dvc("stage", "list", "--name-only").out.split()
    assert {name for name in listed if name.startswith("quantize@")} == {*BUILT, "quantize@second-w8"}
    shown = two.run("python", "-m", "stages.list")
    assert {line.split()[0] for line in shown.out.splitlines()[1:]} == {"demo/w4", "second/w4"}
    planned = two.run("python", "-m", "stages.plan", "variant=second/w4")
    assert planned.code == 0, planned.text
    wrong = two.run("python", "-m", "stages.plan", "variant=second/w9")
    assert "did you mean second/w8?" in wrong.err
    verified = two.run("python", "-m", "stages.verify")
    assert verified.code == 0, verified.text
