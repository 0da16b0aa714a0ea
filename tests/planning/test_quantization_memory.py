from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from tiny_quantized import write_float

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.planning.quantization_memory import computed_in, quantization_peak
from quantline.toolchains.toolchain import worker_environment


def peak(model, **changes):
    checkpoint, config = Checkpoint.open(model), json.loads((model / "config.json").read_text())
    options = {
        "method": "gptq", "backend": "auto_gptq", "dtype": "float32", "tokens": 1000,
        "low_memory": False, "output": 10_000, **changes,
    }  # fmt: skip
    return quantization_peak(checkpoint, config, **options)


def test_gptq_holds_the_model_the_activations_and_three_hessians(tmp_path):
    found = peak(write_float(tmp_path / "model", tied=True, layers=2))
    values = sum(
        np.prod(Checkpoint.open(tmp_path / "model").info(name).shape)
        for name in Checkpoint.open(tmp_path / "model").names
    )
    assert found.model == values * 4
    assert found.calibration == 2 * 1000 * 256 * 4
    assert found.solver == 3 * 4 * (512 * 512 + 512 * 256)
    assert found.total == found.model + found.calibration + found.solver + found.process
    assert peak(tmp_path / "model", dtype=computed_in("auto", "cuda")).model == values * 2


def test_low_memory_holds_a_block_and_what_is_outside_the_blocks(tmp_path):
    model = write_float(tmp_path / "model", tied=True, layers=4)
    block = 4 * (256 * 256 * 2 + 2 * 128 * 256 + 3 * 256 * 512)
    assert peak(model).model - peak(model, low_memory=True).model == 3 * block


def test_rounding_to_nearest_takes_no_more_than_it_says(tmp_path):
    size = 3000
    folder = tmp_path / "model"
    folder.mkdir()
    random = np.random.default_rng(0)
    weights = {
        f"model.layers.{index}.mlp.up_proj.weight": random.random((size, size), dtype=np.float32) for index in range(3)
    }
    write_safetensors(folder / "model.safetensors", weights)
    config = {"model_type": "qwen2", "hidden_size": size, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    code = (
        "import json, sys; from quantline.toolchains.workers.quantizers import native;"
        "native.run(json.loads(sys.argv[1]), lambda *_: None);"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) * 1024)"
    )
    (tmp_path / "output").mkdir()
    job = {"model": str(folder), "output": str(tmp_path / "output"), "bits": 8, "group_size": -1, "options": {}}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(job)],
        env=worker_environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = int(done.stdout)
    said = peak(folder, method="rtn", backend="native", output=3 * size * size)
    print(f"{seen / 1e6:.0f} MB seen, {said.total / 1e6:.0f} MB said")
    assert size * size * 4 < seen < said.total + 3 * size * size * 4  # the mapped model counts as memory too
