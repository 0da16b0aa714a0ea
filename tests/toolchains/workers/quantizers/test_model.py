from __future__ import annotations

import shutil

import pytest

from quantline.core.errors import QuantlineError

pytestmark = [pytest.mark.toolchain("autoawq"), pytest.mark.toolchain("reference")]


def test_a_float16_model_is_probed_in_float32_and_left_as_it_was(work, job_for):
    job = job_for("qwen2", "probe")
    facts = work("autoawq", "probe_facts", {"model": job["model"], "probe": job["probe"]})
    assert facts["from_float32"] == 0
    assert facts["float16_from_float32"] > 1e-4
    assert facts["untouched"]
    assert facts["untouched_by_failure"]


def test_an_error_of_the_library_names_the_model_not_the_translated_copy_that_is_gone(work, job_for, tmp_path):
    job = job_for("qwen2", "without weights")
    model = shutil.copytree(job["model"], tmp_path / "model")
    for path in model.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(QuantlineError) as caught:
        work("autoawq", "quantline.toolchains.workers.quantizers.autoawq", {**job, "model": str(model)})
    assert f"in directory {model}" in str(caught.value)
    assert "quantline-model-" not in str(caught.value)
