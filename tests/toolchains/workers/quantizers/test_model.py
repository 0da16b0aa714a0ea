from __future__ import annotations

import pytest

pytestmark = [pytest.mark.toolchain("autoawq"), pytest.mark.toolchain("reference")]


def test_a_float16_model_is_probed_in_float32_and_left_as_it_was(work, job_for):
    job = job_for("qwen2", "probe")
    facts = work("autoawq", "probe_facts", {"model": job["model"], "probe": job["probe"]})
    assert facts["from_float32"] == 0
    assert facts["float16_from_float32"] > 1e-4
    assert facts["untouched"]
    assert facts["untouched_by_failure"]
