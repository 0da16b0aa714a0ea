import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantline.core.errors import DiskFullError, UserError, WorkerError
from quantline.toolchains import environments, toolchain
from quantline.toolchains.environments import ensure, expected_version, locked_version
from quantline.toolchains.runner import run_worker
from quantline.toolchains.toolchain import Toolchain

HERE = Toolchain("reference", Path(sys.executable), None)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Write a worker module, put it on the workers' path and run it."""

    def run(body: str, job=None):
        package = tmp_path / "src"
        package.mkdir(exist_ok=True)
        (package / "work.py").write_text(
            f"from quantline.toolchains.protocol import JobError, worker_main\n{body}\nworker_main(run)\n"
        )
        source = toolchain.worker_environment(1)["PYTHONPATH"]
        extra = {"PYTHONPATH": os.pathsep.join([str(package), source])}
        log = tmp_path / "work.log"
        return run_worker(HERE, "work", job or {}, log=log, threads=1, label="work", extra_environment=extra)

    return run


def test_a_workers_data_comes_back_with_its_peak_memory(worker):
    result = worker("def run(job, report): return {'twice': 2 * job['x']}", {"x": 21})
    assert result.data == {"twice": 42}
    assert result.peak_memory_bytes > 1_000_000
    assert result.versions["python"].startswith("3.")


def test_progress_is_not_lost_in_a_librarys_own_bar(worker, tmp_path):
    worker(
        "from tqdm import tqdm\ndef run(job, report):\n    for step in tqdm(range(2)): report(step, 2)\n    return {}"
    )
    assert "@progress" not in (tmp_path / "work.log").read_text()


def test_a_refusal_crosses_as_a_user_error_without_traceback(worker):
    with pytest.raises(UserError, match="group_size=7: no"):
        worker("def run(job, report): raise JobError('group_size=7: no')")


def test_a_worker_that_finds_no_room_on_the_disk_says_that(worker):
    body = "import errno\ndef run(job, report): raise OSError(errno.ENOSPC, 'No space left on device')"
    with pytest.raises(DiskFullError, match="the disk is full; free some space and run the stage again"):
        worker(body)


def test_a_crash_names_the_log_and_the_log_holds_the_traceback(worker, tmp_path):
    with pytest.raises(WorkerError, match=r"ZeroDivisionError.*work\.log"):
        worker("def run(job, report): 1 / 0")
    assert "Traceback" in (tmp_path / "work.log").read_text()


def test_a_killed_worker_is_not_a_success(worker):
    with pytest.raises(WorkerError, match="killed by signal 9"):
        worker("import os\ndef run(job, report): os.kill(os.getpid(), 9)")


def test_a_result_without_exit_code_zero_is_not_a_success(worker):
    body = "import os\ndef run(job, report):\n    os._exit = lambda code: exit(5)\n    return {}"
    with pytest.raises(WorkerError, match="exited with code 5"):
        worker(body)


def test_exit_code_zero_without_a_result_is_not_a_success(worker):
    with pytest.raises(WorkerError, match="without a result"):
        worker("import os\ndef run(job, report): os._exit(0)")


def test_the_log_holds_what_the_worker_prints_and_every_step_with_its_time(worker, tmp_path):
    worker("def run(job, report):\n    print('hello')\n    report(1, 2, 'layer')\n    return {}")
    hello, step = (tmp_path / "work.log").read_text().splitlines()
    assert hello == "hello"
    assert re.fullmatch(r"\[\d+\.\d s\] at 1/2 layer", step)


def test_a_crash_names_the_step_that_it_came_in(worker):
    with pytest.raises(WorkerError, match=r"failed at 3/9 layer 3 mlp\.up_proj: .*ZeroDivisionError"):
        worker("def run(job, report):\n    report(3, 9, 'layer 3 mlp.up_proj')\n    1 / 0")
    with pytest.raises(WorkerError, match=r"killed by signal 9.* at 1/2 layer 1; its log"):
        worker("import os\ndef run(job, report):\n    report(1, 2, 'layer 1')\n    os.kill(os.getpid(), 9)")


def test_a_worker_sees_no_tokens(worker, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    data = worker("import os\ndef run(job, report): return dict(os.environ)").data
    assert not [key for key, value in data.items() if "secret" in value]


@pytest.mark.e2e
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_worker_does_not_outlive_its_parent_whatever_ends_that(tmp_path, how):
    (tmp_path / "work.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom quantline.toolchains.protocol import worker_main\n"
        "def run(job, report):\n    Path(job['pid']).write_text(str(os.getpid()))\n    time.sleep(60)\n    return {}\n"
        "worker_main(run)\n"
    )
    source = toolchain.worker_environment(1)["PYTHONPATH"]
    path = os.pathsep.join([str(tmp_path), source])
    pid = tmp_path / "pid"
    parent = (
        "import sys; from pathlib import Path; from quantline.toolchains.runner import run_worker\n"
        "from quantline.toolchains.toolchain import Toolchain\n"
        f"run_worker(Toolchain('reference', Path(sys.executable), None), 'work', {{'pid': {str(pid)!r}}},"
        f" log=Path({str(tmp_path / 'log')!r}), threads=1, label='w', extra_environment={{'PYTHONPATH': {path!r}}})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": source, "TMPDIR": str(tmp_path)}
    )
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(pid.read_text())
    process.send_signal(how)
    assert process.wait(20) != 0
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_cuda_is_refused_where_no_driver_is_loaded(monkeypatch):
    monkeypatch.setattr(environments, "detect_platform", lambda: "cpu")
    assert environments.usable_platform("auto") == environments.usable_platform("cpu") == "cpu"
    with pytest.raises(UserError, match="device=cuda: no NVIDIA driver is loaded"):
        environments.usable_platform("cuda")
    monkeypatch.setattr(environments, "detect_platform", lambda: "cuda")
    assert environments.usable_platform("cuda") == environments.usable_platform("auto") == "cuda"


def test_an_interpreter_that_is_not_there_is_refused_by_option_name(root):
    with pytest.raises(UserError, match=r"toolchains\.vllm=/no/such/python"):
        ensure(root, "vllm", python="/no/such/python")


def test_a_folder_or_a_broken_script_in_place_of_an_interpreter_is_refused(root, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(UserError, match="is not a Python interpreter"):
        ensure(root, "vllm", python=str(tmp_path))
    with pytest.raises(UserError, match="cannot be run"):
        ensure(root, "vllm", python=str(script))


def test_an_interpreter_without_the_library_is_refused(root):
    with pytest.raises(UserError, match="health check failed"):
        ensure(root, "autoawq", python=sys.executable)


def test_every_toolchain_has_a_complete_lock_for_every_platform(root):
    for name in environments.HEALTH_CHECKS:
        for platform in environments.PLATFORMS:
            lines = environments.lock_file(root, name, platform).read_text().splitlines()
            assert len(lines) > 20 or name == "router"  # Envoy's wheel needs nothing else
            assert lines
            assert all("==" in line and "://" not in line for line in lines), (name, platform)


def test_environments_of_both_platforms_lie_side_by_side(small_lock, monkeypatch):
    shutil.copyfile(small_lock / "envs" / "reference-cpu.txt", small_lock / "envs" / "reference-cuda.txt")
    monkeypatch.setitem(environments.HEALTH_CHECKS, "reference", "import sys")
    both = [ensure(small_lock, "reference", platform=platform).python for platform in ("cpu", "cuda")]
    assert both[0] != both[1]
    assert all(python.exists() for python in both)


@pytest.fixture
def small_lock(tmp_path, monkeypatch):
    """A checkout whose only toolchain holds one small package."""
    (tmp_path / "envs").mkdir()
    lock = tmp_path / "envs" / "reference-cpu.txt"
    lock.write_text("six==1.17.0\n")
    monkeypatch.setitem(environments.HEALTH_CHECKS, "reference", "import six")
    return tmp_path


def test_an_environment_is_built_once_and_again_when_its_lock_changes(small_lock):
    state = small_lock / ".venvs" / "reference-cpu" / "quantline-state.json"
    ensure(small_lock, "reference", platform="cpu")
    first = json.loads(state.read_text())
    stamp = state.stat().st_mtime_ns
    ensure(small_lock, "reference", platform="cpu")
    assert state.stat().st_mtime_ns == stamp
    (small_lock / "envs" / "reference-cpu.txt").write_text("six==1.16.0\n")
    ensure(small_lock, "reference", platform="cpu")
    assert json.loads(state.read_text()) != first


def test_a_half_built_environment_is_replaced(small_lock):
    folder = small_lock / ".venvs" / "reference-cpu"
    (folder / "bin").mkdir(parents=True)
    (folder / "rubbish").write_text("x")
    ensure(small_lock, "reference", platform="cpu")
    assert not (folder / "rubbish").exists()


def test_an_environment_that_fails_its_health_check_is_removed(small_lock, monkeypatch):
    monkeypatch.setitem(environments.HEALTH_CHECKS, "reference", "import no_such_module")
    with pytest.raises(WorkerError, match="no_such_module"):
        ensure(small_lock, "reference", platform="cpu")
    assert not (small_lock / ".venvs" / "reference-cpu").exists()


def test_a_lock_that_cannot_be_installed_leaves_nothing(small_lock):
    (small_lock / "envs" / "reference-cpu.txt").write_text("six==99.0\n")
    with pytest.raises(WorkerError, match="could not be installed"):
        ensure(small_lock, "reference", platform="cpu")
    assert not (small_lock / ".venvs" / "reference-cpu").exists()


def test_who_waits_too_long_for_an_environment_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "BUILD_SECONDS", 0.1)
    lock, build = tmp_path / ".venvs" / ".vllm.lock", environments._building_alone
    with build(lock), pytest.raises(WorkerError, match="another process has been building"), build(lock):
        pass


def test_the_version_of_a_server_is_known_without_its_environment(root, tmp_path):
    (tmp_path / "envs").symlink_to(root / "envs")
    locked = locked_version(root, "vllm", "cpu")
    assert expected_version(tmp_path, "vllm", "cpu") == (locked, None)
    assert locked_version(root, "reference", "cpu").startswith("5.")  # of transformers
    version, note = expected_version(tmp_path, "vllm", "cpu", python="/other/machine/python")
    assert version == locked
    assert (
        note == f"toolchains.vllm=/other/machine/python: is not on this machine; assumed is vllm {locked}, as in envs/"
    )
    assert not (tmp_path / ".venvs").exists()


def test_the_version_of_a_named_server_is_asked_of_its_interpreter(root, tmp_path):
    packages = tmp_path / "site" / "vllm-9.8.7+cpu.dist-info"
    packages.mkdir(parents=True)
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.8.7+cpu\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert expected_version(root, "vllm", "cpu", python=str(python)) == ("9.8.7", None)
    with pytest.raises(UserError, match=r"does not have lm_eval; install it there or set toolchains\.lm_eval=null"):
        expected_version(root, "lm_eval", "cpu", python=str(python))


def test_what_stands_in_for_a_package_reaches_environments_that_were_built_before(small_lock):
    packages = ensure(small_lock, "reference", platform="cpu").python.parents[1] / "lib"
    state = small_lock / ".venvs" / "reference-cpu" / "quantline-state.json"
    stamp = state.stat().st_mtime_ns
    for folder, text in (("reference/absent", "1"), ("reference-cpu/deep/inside", "2"), ("reference-cuda/other", "3")):
        module = small_lock / "envs" / "stand_ins" / folder / "__init__.py"
        module.parent.mkdir(parents=True)
        module.write_text(f"value = {text}\n")
    python = ensure(small_lock, "reference", platform="cpu").python
    code = "import absent, deep.inside; print(absent.value, deep.inside.value)"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout == "1 2\n"
    assert not list(packages.rglob("other"))
    assert state.stat().st_mtime_ns == stamp
