from __future__ import annotations

import json
import subprocess

import pytest

from quantline.checkpoints.model_config import WITH_IMAGES
from quantline.planning.model_types import why_unknown
from quantline.toolchains.environments import ensure, locked_version
from quantline.toolchains.toolchain import worker_environment

ASK = """
import json
from transformers.models.auto import modeling_auto as auto
causal, whole = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
print(json.dumps([dict(causal), dict(whole)]))
"""
# Causal LMs of transformers that take what is beside the language model of such a checkpoint, too, or pass it over.
IN_WHOLE = {"qwen3_5", "qwen3_5_moe"}


def test_a_type_that_the_reference_engine_does_not_build_is_refused_with_the_remedy():
    fault = why_unknown({"model_type": "aya_vision", "architectures": ["AyaVisionForConditionalGeneration"]}, "5.19.0")
    assert fault.startswith(
        "model_type=aya_vision in config.json: the reference engine, with transformers 5.19.0, builds no"
    )
    assert "toolchains.reference=PYTHON" in fault
    assert "timm and Pillow" in why_unknown({"model_type": "gemma3n"}, "5.19.0")
    assert "language model alone" in why_unknown(
        {"model_type": "emu3", "architectures": ["Emu3ForConditionalGeneration"]}, "5.19.0"
    )
    assert why_unknown({"model_type": "emu3", "architectures": ["Emu3ForCausalLM"]}, "5.19.0") is None
    assert why_unknown({"model_type": "of tomorrow"}, "6.1.0") is None  # nothing is known of that version


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "qwen2_5_vl", "llama4"])
def test_types_that_it_builds_pass(kind):
    assert why_unknown({"model_type": kind}, "5.19.0") is None


@pytest.mark.toolchain("reference")
def test_the_table_is_what_the_transformers_of_the_lock_says(root):
    python, version = ensure(root, "reference").python, locked_version(root, "reference", "cpu")
    done = subprocess.run(
        [python, "-c", ASK], capture_output=True, text=True, check=True, env=worker_environment(1)
    )  # fmt: skip
    causal, whole = json.loads(done.stdout.splitlines()[-1])
    known = {kind for kind in {*causal, *whole} if why_unknown({"model_type": kind}, version) is None}
    assert known == ({*causal} | WITH_IMAGES) - {"gemma3n"}
    assert set(whole) >= WITH_IMAGES
    for kind in (set(causal) & set(whole)) - WITH_IMAGES - IN_WHOLE - {"gemma3n"}:
        fault = why_unknown({"model_type": kind, "architectures": [whole[kind]]}, version)
        assert (fault is None) == (causal[kind] == whole[kind]), kind
