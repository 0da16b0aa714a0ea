"""The tools' own readers load what was converted from msModelSlim, and compute what the dequantized weights compute."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from quantline.checkpoints.model_config import legacy_copy
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.toolchains import environments, runner, toolchain
from tests.conversion.test_convert_msmodelslim import FIXTURES, needs_fixtures

TOKENS = list(range(3, 35))
AUTOAWQ = """
import sys, numpy, torch, awq.models.base, awq.modules.linear.gemm
from awq import AutoAWQForCausalLM
awq.models.base.get_best_device = lambda: "cpu:0"
awq.modules.linear.gemm.TRITON_AVAILABLE = False
model = AutoAWQForCausalLM.from_quantized(sys.argv[1], fuse_layers=False, device_map={"": "cpu"}).model
with torch.no_grad():
    logits = model(torch.arange(3, 35)[None]).logits[0]
numpy.save(sys.argv[2], logits.float().numpy())
"""
AUTOGPTQ = """
import sys, numpy, torch
from auto_gptq import AutoGPTQForCausalLM
model = AutoGPTQForCausalLM.from_quantized(
    sys.argv[1], device="cpu", use_safetensors=True, model_basename="model", disable_exllama=True,
    disable_exllamav2=True, torch_dtype=torch.float32,
).model.float()
with torch.no_grad():
    logits = model(torch.arange(3, 35)[None]).logits[0]
numpy.save(sys.argv[2], logits.float().numpy())
"""

pytestmark = needs_fixtures


@pytest.mark.parametrize(
    "case",
    [
        # AutoAWQ computes in float16 on a CPU too; the logits' deviation is about 0.3.
        pytest.param(("awq", "w4a16_g64_awq_asym", AUTOAWQ, 0.01), marks=pytest.mark.toolchain("autoawq")),
        pytest.param(("gptq", "w4a16_g64_awq_sym", AUTOGPTQ, 1e-5), marks=pytest.mark.toolchain("auto_gptq")),
        pytest.param(("gptq", "w8a16_g64_gptq_sym", AUTOGPTQ, 1e-5), marks=pytest.mark.toolchain("auto_gptq")),
    ],
)
def test_the_tool_computes_what_the_weights_mean(root, tmp_path, case):
    target, fixture, script, tolerance = case
    names = {"awq": "autoawq", "gptq": "auto_gptq"}
    python, reference = (
        environments.environment_folder(root, name) / "bin" / "python" for name in (names[target], "reference")
    )
    if not python.exists() or not reference.exists():
        pytest.skip(f"the {names[target]} and reference environments are not built")
    out = tmp_path / "out"
    out.mkdir()
    convert(FIXTURES / fixture, out, ConvertConfig(target=target))
    # These tools' transformers reads older configs; the weights are the converted ones.
    folder = legacy_copy(out, tmp_path / "legacy")
    found = tmp_path / "logits.npy"
    done = subprocess.run(
        [python, "-c", script, folder, found], env=toolchain.worker_environment(1), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = {"checkpoint": str(out), "input_ids": [TOKENS], "output": str(tmp_path / "p.safetensors")}
    runner.run_worker(
        environments.ensure(root, "reference"),
        "quantline.toolchains.workers.reference.engine",
        job,
        log=tmp_path / "log",
        threads=1,
        label="probe",
    )
    from safetensors.numpy import load_file

    expected = load_file(tmp_path / "p.safetensors")["logits"][0]
    difference = np.abs(np.load(found) - expected).max()
    print(f"{names[target]}: largest difference of logits {difference:.2g}, their deviation {expected.std():.2g}")
    assert difference < tolerance
