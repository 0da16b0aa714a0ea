"""Inputs of linears rounded by the reference engine: equal to the library whose schemes these are.

Not compared are 8-bit integers (W8A8): the library divides by 127.5, servers by 127, and the engine follows those.
"""

from __future__ import annotations

import subprocess

import pytest
from checkout_paths import interpreter

from quantline.toolchains.toolchain import worker_environment

pytestmark = pytest.mark.toolchain("llmcompressor")

# Every scheme that rounds inputs, over magnitudes from 1e-6 to 1e4, with ties, outliers and an all-zero token.
COMPARE = """
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus
from quantline.checkpoints.layouts.compressed_tensors.config import FP8
from quantline.checkpoints.layouts.compressed_tensors.schemes import SCHEMES
from quantline.toolchains.workers.reference.rounded_inputs import rounder
torch.manual_seed(0)
grid = torch.tensor([0, .25, .5, .75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6] * 32)[:448]
values = torch.randn(1, 40, 512) * torch.logspace(-6, 4, 40)[None, :, None]
values[0, 3] = 0
values[0, 4, :448], values[0, 4, 448:] = grid, 6
values[0, 5, ::17] *= 300
known = {**{name: one.activations for name, one in SCHEMES.items() if one.activations}, "W4AFP8": FP8}
for name, how in known.items():
    args = preset_name_to_scheme(name, ["Linear"]).input_activations
    module, fixed = torch.nn.Linear(512, 1), None
    module.quantization_status = QuantizationStatus.FROZEN
    if how.tensor == "input_scale":
        fixed = float(values.abs().max() / 448)
        module.input_scale = torch.tensor([fixed])
    elif how.tensor:
        fixed = float(448 * 6 / values.abs().max())
        module.input_global_scale = torch.tensor([fixed])
    theirs = forward_quantize(module, values, "input", args)
    ours = rounder(how, fixed)(values)
    wrong = (ours - theirs).abs() > 2.0**-20 * theirs.abs()
    # Quotients of the two differ in the last bit, which may decide a value that is halfway.
    print(name, int(wrong.sum()), float((ours - values).abs().max() / values.abs().max()))
    assert wrong.float().mean() < 2e-4, name
    assert ours[0, 3].abs().sum() == 0, name
"""


def test_every_scheme_rounds_inputs_as_its_library_does() -> None:
    python = interpreter("llmcompressor")
    if not python.exists():
        pytest.skip("the llmcompressor environment is not built")
    done = subprocess.run(
        [python, "-c", COMPARE], capture_output=True, text=True, env=worker_environment(1), check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 7
