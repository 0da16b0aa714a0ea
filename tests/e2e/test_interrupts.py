"""Ctrl-C in every stage, as a terminal sends it: to the whole process group."""

from __future__ import annotations

import json
import os
import shutil
import signal

import psutil
import pytest
from checkout import Checkout, wait_for

# Whichever of these tests comes first builds the pipeline, and the environments where they are not there.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]


def interrupt(copy: Checkout, stage: str, *overrides: str, when) -> None:
    process = copy.start(*copy.stage_command(stage, *overrides))
    try:
        wait_for(lambda: when(process.pid), process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, out + err
    assert "interrupted; nothing half written was left" in err
    assert "Traceback" not in err


def below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def computing(module: str):
    """Whether a worker of that name runs and has its libraries loaded."""

    def holds(pid: int) -> bool:
        for process in below(pid):
            try:
                if module in process.cmdline() and process.memory_info().rss > 250e6:
                    return True
            except psutil.NoSuchProcess:
                continue
        return False

    return holds


def partial(copy: Checkout, stage: str, home: str = "scratch"):
    """Whether a half-written output is there."""
    return lambda _pid: any((copy.root / home).rglob(f".{stage}.partial-*"))


def test_ctrl_c_in_download(bare, untouched):
    interrupt(bare, "download", when=computing("quantline.toolchains.workers.reference.engine"))


def test_ctrl_c_in_calibrate(pipeline, untouched, tmp_path):
    text = tmp_path / "long.jsonl"
    row = json.dumps({"text": "The planner reads an index where that is cheaper than the table. " * 40}) + "\n"
    text.write_text(row * 20_000)
    source = [f"calibration.sources.demo.path={text}", "calibration.n_samples=30000"]
    interrupt(pipeline, "calibrate", *source, when=partial(pipeline, "calibrate"))


@pytest.mark.parametrize(("method", "worker"), [("awq", "autoawq"), ("gptq", "auto_gptq")])
def test_ctrl_c_in_quantize(pipeline, untouched, method, worker):
    interrupt(
        pipeline, "quantize", f"method={method}", when=computing(f"quantline.toolchains.workers.quantizers.{worker}")
    )


def test_ctrl_c_in_quantize_without_a_worker(pipeline, untouched):
    interrupt(pipeline, "quantize", "method=rtn", when=partial(pipeline, "quantize"))


def test_ctrl_c_in_convert(pipeline, untouched):
    options = ["method=gptq", "convert.target=gptq_v2"]
    interrupt(pipeline, "convert", *options, when=partial(pipeline, "convert"))


def test_ctrl_c_in_serve_smoke_while_the_server_loads(pipeline, untouched):
    interrupt(pipeline, "serve_smoke", "method=float", when=lambda pid: len(below(pid)) >= 5)


def test_a_stage_that_is_killed_takes_its_worker_along_and_the_next_run_clears_up(pipeline):
    options = ["method=gptq", "variant=killed"]
    process = pipeline.start(*pipeline.stage_command("quantize", *options))
    with process:
        wait_for(lambda: computing("quantline.toolchains.workers.quantizers.auto_gptq")(process.pid), process)
        workers = below(process.pid)
        process.kill()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert any("killed/.quantize.partial-" in path for path in pipeline.leftovers())
    try:
        interrupt(pipeline, "quantize", *options, when=computing("quantline.toolchains.workers.quantizers.auto_gptq"))
        assert not [path for path in pipeline.leftovers() if ".partial-" in path]
    finally:
        shutil.rmtree(pipeline.root / "scratch" / "killed", ignore_errors=True)
        for path in pipeline.temporary.glob("quantline-job-*"):
            shutil.rmtree(path)


def test_ctrl_c_in_evaluate(pipeline, untouched):
    interrupt(pipeline, "evaluate", "method=gptq", when=computing("quantline.toolchains.workers.reference.evaluate"))
