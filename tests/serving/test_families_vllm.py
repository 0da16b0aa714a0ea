"""Families that the real server loads only with what stands in for packages of its environment."""

from __future__ import annotations

import json
import subprocess

import pytest
from checkout_paths import interpreter

from quantline.toolchains import environments
from quantline.toolchains.toolchain import worker_environment

pytestmark = pytest.mark.toolchain("vllm")


@pytest.fixture(scope="module")
def python(root):
    if not interpreter("vllm").exists():
        pytest.skip("the vllm environment is not built")
    return environments.ensure(root, "vllm").python


def test_what_stands_in_for_torchvision_gives_its_names_and_says_what_is_missing_when_used(python):
    code = (
        "import json, torchvision.transforms.v2.functional as f\n"
        "from torchvision.transforms import InterpolationMode, v2\n"
        "from torchvision.ops.boxes import batched_nms\n"
        "from transformers.models.gemma3 import image_processing_gemma3\n"
        "try: f.resize(1)\n"
        "except RuntimeError as error: print(json.dumps([InterpolationMode.BICUBIC.value, str(error)]))"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, env=worker_environment(1)
    )  # fmt: skip
    name, reason = json.loads(done.stdout.splitlines()[-1])
    assert name == "bicubic"
    assert "takes no images; give text alone" in reason
