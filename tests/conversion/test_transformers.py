"""transformers loads what was converted, with the packages that read each format, and computes what the weights mean."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from tiny_quantized import write_quantized

from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.toolchains import environments, runner, toolchain

TOKENS = list(range(3, 35))
LOAD = """
import sys, numpy, torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
if sys.argv[3]:
    config.quantization_config["backend"] = sys.argv[3]
model, found = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], config=config, dtype=torch.float32, output_loading_info=True
)
assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
with torch.no_grad():
    logits = model.eval()(torch.arange(3, 35)[None]).logits[0]
numpy.save(sys.argv[2], logits.float().numpy())
"""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(("compressed_tensors", "vllm", "", 1e-5), marks=pytest.mark.toolchain("vllm")),
        # Its plain torch kernel; what it takes by itself on a CPU computes in bfloat16. Scales are float16 in both.
        pytest.param(("awq", "gptqmodel", "torch_awq", 0.01), marks=pytest.mark.toolchain("gptqmodel")),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_computes_what_the_weights_mean(root, tmp_path, case, symmetric):
    target, name, backend, tolerance = case
    python, reference = (environments.environment_folder(root, one) / "bin" / "python" for one in (name, "reference"))
    if not python.exists() or not reference.exists():
        pytest.skip(f"the {name} and reference environments are not built")
    # The other way round first, so that every tensor of the result was made by conversion.
    write_quantized(tmp_path / "source", "gptq_v2" if target == "awq" else "awq_gemm", sym=symmetric, group_size=64)
    for label, folder, goal in (("middle", "source", "msmodelslim"), ("out", "middle", target)):
        (tmp_path / label).mkdir()
        convert(tmp_path / folder, tmp_path / label, ConvertConfig(target=goal))
    found = tmp_path / "logits.npy"
    done = subprocess.run(
        [python, "-c", LOAD, tmp_path / "out", found, backend], env=toolchain.worker_environment(1),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = {
        "checkpoint": str(tmp_path / "source"), "input_ids": [TOKENS],
        "output": str(tmp_path / "probe.safetensors"),
    }  # fmt: skip
    runner.run_worker(
        environments.ensure(root, "reference"),
        "quantline.toolchains.workers.reference.engine",
        job,
        log=tmp_path / "log",
        threads=1,
        label="probe",
    )
    from safetensors.numpy import load_file

    expected = load_file(tmp_path / "probe.safetensors")["logits"][0]
    difference = np.abs(np.load(found) - expected).max()
    print(f"{target}: largest difference of logits {difference:.2g}, their deviation {expected.std():.2g}")
    assert difference < tolerance
