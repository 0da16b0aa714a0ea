import errno
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from quantline.checkpoint import write_safetensors
from quantline.conversion import engine
from quantline.conversion.faults import ProofError
from quantline.conversion.workers import can_fork, forked
from quantline.convert import Options, convert
from quantline.errors import WorkerError
from quantline.formats import FormatError


@pytest.fixture
def source(tmp_path):
    """An msModelSlim checkpoint of several linears and a float tensor."""
    folder, random = tmp_path / "source", np.random.default_rng(0)
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": random.normal(size=(16, 64)).astype(np.float16)}
    described = {"model_quant_type": "W4A16", "model.embed_tokens.weight": "FLOAT"}
    for index in range(6):
        name = f"model.layers.{index}.mlp.up_proj"
        tensors[f"{name}.weight"] = random.integers(-8, 8, (96, 64), dtype=np.int8)
        tensors[f"{name}.weight_scale"] = random.uniform(1e-3, 1e-2, (96, 2)).astype(np.float32)
        tensors[f"{name}.weight_offset"] = random.integers(-8, 8, (96, 2)).astype(np.float32)
        described |= {f"{name}.{suffix}": "W4A16" for suffix in ("weight", "weight_scale", "weight_offset")}
    write_safetensors(folder / "quant_model_weight_w4a16.safetensors", tensors)
    engine.write_json(folder / "quant_model_description_w4a16.json", described)
    engine.write_json(folder / "config.json", {"model_type": "qwen2"})
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def forking(monkeypatch):
    """Fork for files of any size; the one thread that a parallel run of the tests adds holds no lock of ours."""
    names = {thread.name for thread in threading.enumerate()}
    assert can_fork() or "PYTEST_XDIST_WORKER" in os.environ, names
    monkeypatch.setattr(engine, "can_fork", lambda: True)
    monkeypatch.setattr(engine, "FORK_BYTES", 0)


def children():
    return [process for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("target", ["awq", "gptq_v2", "compressed_tensors"])
@pytest.mark.parametrize("shard_size", ["4GB", "8KB"])
def test_processes_write_what_one_process_writes(source, tmp_path, monkeypatch, target, shard_size):
    files = []
    for label, limit in (("one", 2**40), ("many", 0)):
        monkeypatch.setattr(engine, "FORK_BYTES", limit)
        (tmp_path / label).mkdir()
        convert(source, tmp_path / label, Options(target=target, shard_size=shard_size))
        files.append({path.name: path.read_bytes() for path in (tmp_path / label).iterdir()})
    assert files[0] == files[1]


def test_the_work_is_done_by_other_processes_which_are_gone_afterwards(source, out, tmp_path, forking, monkeypatch):
    work = engine._linear

    def noted(*arguments):
        (tmp_path / f"pid-{os.getpid()}").touch()
        return work(*arguments)

    monkeypatch.setattr(engine, "_linear", noted)
    convert(source, out, Options(target="awq"))
    workers = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert workers
    assert os.getpid() not in workers
    assert not any(psutil.pid_exists(worker) for worker in workers)


def fail(monkeypatch, error):
    def failing(plan, name, file):
        if name.startswith("model.layers.3"):
            raise error
        return work(plan, name, file)

    work = engine._linear
    monkeypatch.setattr(engine, "_linear", failing)


@pytest.mark.parametrize(
    "error",
    [
        ProofError("x: codes differ"), FormatError("x: codes range over [0, 99]"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ZeroDivisionError("a fault of ours"),
    ],
)  # fmt: skip
def test_what_a_process_raises_is_raised_and_nothing_is_left(source, out, forking, monkeypatch, error):
    fail(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        convert(source, out, Options(target="gptq"))
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)
    assert list(out.iterdir()) == []
    assert children() == []


def test_a_writer_that_changes_a_code_is_caught_by_the_process_that_reads_the_disk(source, out, forking, monkeypatch):
    from quantline.formats.streaming import StreamedFile

    put = StreamedFile.put

    def faulty(self, name, array):
        if name.endswith("layers.4.mlp.up_proj.qweight"):
            array = array.copy()
            array[3, 1] ^= 16
        put(self, name, array)

    monkeypatch.setattr(StreamedFile, "put", faulty)
    with pytest.raises(ProofError, match=r"model.layers.4.mlp.up_proj: codes read back from .* differ"):
        convert(source, out, Options(target="awq"))
    assert list(out.iterdir()) == []


def test_a_process_that_is_killed_ends_the_conversion(source, out, forking, monkeypatch):
    monkeypatch.setattr(engine, "_linear", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkerError, match="a worker of the conversion was killed"):
        convert(source, out, Options(target="awq"))
    assert list(out.iterdir()) == []
    assert children() == []


def test_a_bug_is_shown_with_its_place(source, out, forking, monkeypatch):
    fail(monkeypatch, ZeroDivisionError("a fault of ours"))
    with pytest.raises(ZeroDivisionError) as caught:
        convert(source, out, Options(target="awq"))
    assert any("in failing" in note for note in caught.value.__notes__)


def test_outcomes_come_with_their_jobs():
    assert dict(forked(lambda job: job * job, [3, 1, 2], 2)) == {1: 1, 2: 4, 3: 9}
    assert dict(forked(lambda job: job, [5], 4)) == {5: 5}
    assert list(forked(lambda job: job, [], 2)) == []


def test_processes_end_when_no_more_outcomes_are_wanted():
    outcomes = forked(lambda _: time.sleep(0.01), list(range(1000)), 2)
    next(outcomes)
    assert len(children()) == 2
    outcomes.close()
    assert children() == []


SLOW = """
import os, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/src"]
from quantline.conversion import engine
engine.FORK_BYTES = 0
work = engine._linear
def slow(*arguments):
    outcome = work(*arguments)
    os.write(1, f"{{os.getpid()}}\\n".encode())
    time.sleep(5)
    return outcome
engine._linear = slow
sys.argv = ["convert", "source=msmodelslim", "source.path=" + {source!r}, "convert.target=gptq", "out=" + {out!r}]
from stages.convert import convert
convert()
"""


@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_takes_its_processes_along(root, tmp_path, source, how, whole_group):
    code = SLOW.format(root=str(root), source=str(source), out=str(tmp_path / "made"))
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        workers = [psutil.Process(int(running.stdout.readline())) for _ in range(2)]
        assert running.pid not in [worker.pid for worker in workers]
        (os.killpg if whole_group else os.kill)(running.pid, how)
        _, errors = running.communicate(timeout=30)
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert "Traceback" not in errors
    assert not (tmp_path / "made").exists()
    if how != signal.SIGKILL:
        assert running.returncode == 130, errors
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
