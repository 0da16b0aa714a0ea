"""Inputs of linears rounded by the reference engine: equal to the library whose schemes these are.

Not compared are 8-bit integers (W8A8): the library divides by 127.5, servers by 127, and the engine follows those.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from checkout_paths import interpreter

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.layouts import LAYOUTS, Storage
from quantline.checkpoints.layouts.compressed_tensors.schemes import SCHEMES
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.quantization_config import describe
from quantline.checkpoints.safetensors_file import numpy_dtype
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
    done = subprocess.run(
        [python, "-c", COMPARE], capture_output=True, text=True, env=worker_environment(1), check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 7


# The linear `a` of each checkpoint, with the rounding of its inputs; what it gives for twos, or why it cannot.
ROUND = """
import sys, torch
from pathlib import Path
from quantline.checkpoints.float_view import FloatView
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.reference.rounded_inputs import round_inputs
for folder in sys.argv[1:]:
    view = FloatView.open(Path(folder))
    high, wide = view.shape("a.weight")
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(wide, high, bias=False)})
    model["a"].weight.data = torch.ones(high, wide)
    try:
        round_inputs(model, view)
        print(float(model["a"](torch.full((1, wide), 2.1))[0, 0].detach()) / wide)
    except JobError as error:
        print(error)
"""


def linear_of(folder: Path, preset: str, wide: int, fixed: int = 0) -> Path:
    """A checkpoint of one linear of zeros; fixed: the bits of the bfloat16 by which its inputs are rounded."""
    scheme = SCHEMES[preset]
    tensors = {
        f"a.{suffix}": np.zeros(spec.shape, numpy_dtype(spec.dtype))
        for suffix, spec in LAYOUTS[scheme.layout].specs((wide, 4), LinearSpec(8, -1), Storage()).items()
    }
    if fixed:
        tensors["a.input_scale"] = np.array([fixed], np.uint16).view(numpy_dtype("BF16"))
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    section = describe(scheme.layout, bits=scheme.bits, group_size=scheme.group_size, symmetric=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": section}))
    return folder


def test_scales_in_bfloat16_are_read_and_what_cannot_be_rounded_is_named(tmp_path: Path) -> None:
    folders = [
        linear_of(tmp_path / "whole", "FP8", 64, fixed=0x3F80),  # 1.0
        linear_of(tmp_path / "nan", "FP8", 64, fixed=0x7FC0),
        linear_of(tmp_path / "narrow", "FP8_BLOCK", 192),
    ]
    done = subprocess.run(
        [interpreter("llmcompressor"), "-c", ROUND, *folders], capture_output=True, text=True,
        env=worker_environment(1), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rounded, nan, narrow = done.stdout.splitlines()
    assert float(rounded) == 2.0  # the nearest of FP8 to 2.1
    assert "a.input_scale is [nan]: it must be one positive number" in nan
    assert "groups of 128 do not fill the 192 inputs of a" in narrow
