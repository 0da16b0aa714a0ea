"""kill -9 in each stage: DVC, the stage and all that it started. The next `dvc repro` ends as an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal

import psutil
import pytest
from checkout import VARIANTS, Checkout, wait_for

from tests.e2e.test_interrupts import below, computing, partial

# Whichever of these tests comes first builds the pipeline, and the environments where they are not there.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

LINE = "method=gptq bits=4 group_size=64 calibration.n_samples=8"


@pytest.fixture
def twins(pipeline):
    """Two variants of the same options, `calm` and `killed`; afterwards nothing of them is left."""
    kept = {name: (pipeline.root / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    pipeline.write_params({**VARIANTS, "calm": LINE, "killed": LINE})
    yield pipeline
    for name, content in kept.items():
        (pipeline.root / name).write_bytes(content)
    for name in ("calm", "killed"):
        shutil.rmtree(pipeline.root / "artifacts" / name, ignore_errors=True)
        (pipeline.root / "variants" / f"{name}.yaml").unlink(missing_ok=True)


def kill(copy: Checkout, *command: str, when) -> None:
    """Kill a `dvc repro` with everything below it, in the moment when `when` holds."""
    process = copy.start("python", "-m", "dvc", "repro", *command)
    wait_for(lambda: when(process.pid), process, 600)
    started = below(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert psutil.wait_procs(started, timeout=20)[1] == [], "what a stage started outlives it"


def hashes(copy: Checkout, name: str, stages) -> dict[str, str]:
    return {stage: copy.result(name, stage)["output_hash"] for stage in stages}


def test_kill_9_while_tokens_weights_and_layouts_are_made(twins):
    done = twins.dvc("repro", "convert@calm")
    assert done.code == 0, done.text
    moments = {
        "calibrate": partial(twins, "calibrate", "artifacts"), 
        "quantize": computing("quantline.toolchains.workers.quantizers.auto_gptq"),
        "convert": partial(twins, "convert", "artifacts"),
    }  # fmt: skip
    for stage, when in moments.items():
        kill(twins, "convert@killed", when=when)
        assert not (twins.root / "artifacts" / "killed" / f"{stage}.json").exists(), "it had ended before"
    done = twins.dvc("repro", "convert@killed")
    assert done.code == 0, done.text
    assert "Running stage 'convert@killed'" in done.text
    assert hashes(twins, "killed", moments) == hashes(twins, "calm", moments)
    assert [path for path in twins.leftovers() if ".partial-" in path] == []
    for path in twins.temporary.glob("quantline-*"):
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("stage", "name", "when"),
    [
        # Not every processor serves variants of 4 bits.
        ("serve_smoke", "float", lambda pid: len(below(pid)) >= 6),
        ("evaluate", "gptq-w4-g128", computing("quantline.toolchains.workers.reference.evaluate")),
    ],
)
def test_kill_9_while_a_model_is_served_or_scored(pipeline, stage, name, when):
    target = f"{stage}_baseline" if name == "float" else f"{stage}@{name}"
    before = hashes(pipeline, name, ("serve_smoke", "evaluate"))
    lock = (pipeline.root / "dvc.lock").read_bytes()
    kill(pipeline, "--force", "--single-item", target, when=when)
    assert not (pipeline.root / "artifacts" / name / f"{stage}.json").exists(), "it had ended before"
    done = pipeline.dvc("repro", target)
    assert done.code == 0, done.text
    assert hashes(pipeline, name, ("serve_smoke", "evaluate")) == before
    assert (pipeline.root / "dvc.lock").read_bytes() == lock
    for path in pipeline.leftovers():
        shutil.rmtree(path)
