from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import fake_server
import psutil
import pytest
import sections
from fake_server import IGNORING

from quantline.core.errors import ServerError, UserError
from quantline.serving.command import command_line
from quantline.serving.ports import require_free
from quantline.serving.server import serve


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def start(tmp_path, model, fault="", **options):
    chosen = sections.server(environment={"FAULT": fault}, **{"startup_timeout_seconds": 20.0, **options})
    return serve(fake_server.interpreter(tmp_path), model, chosen, log=tmp_path / "logs" / "server.log")


def gone(processes, seconds=15.0):
    return psutil.wait_procs(processes, timeout=seconds)[1] == []


def test_a_server_answers_inside_the_block_and_no_process_of_it_is_left_after(tmp_path, model):
    with start(tmp_path, model) as server:
        processes = server.processes()
        assert server.client().get("/version").json() == {"version": "0.0.1"}
        assert server.max_model_len == 16
        assert 0 < server.load_seconds < 20
        assert server.memory_bytes() > 1_000_000
    assert processes
    assert gone(processes, 0.1)
    with pytest.raises(ServerError, match="ended with code"):
        server.require_alive("testing")


def test_a_child_that_ignores_sigterm_in_a_session_of_its_own_is_ended_too(tmp_path, model):
    environment = {"FAULT": "stubborn"}
    command = [
        sys.executable,
        "-I",
        "-S",
        "src/quantline/serving/process_tree.py",
        "0.5",
        str(fake_server.interpreter(tmp_path)),
    ]
    options = sections.server()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command += command_line(tmp_path, model, options, port)[1:]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **environment}) as process:
        stray, deadline = [], time.monotonic() + 10
        while not stray and time.monotonic() < deadline:
            found = psutil.Process(process.pid).children(recursive=True)
            with suppress(psutil.NoSuchProcess):  # a parent on its way out, which is what the child is to be left by
                stray = [
                    one for one in found if IGNORING[-17:] in " ".join(one.cmdline()) and one.ppid() == process.pid
                ]
            time.sleep(0.05)
        assert os.getsid(stray[0].pid) == stray[0].pid
        process.stdin.close()
        process.wait(15)
    assert gone(found, 0.1)


def test_nothing_is_left_even_when_the_supervisor_is_killed(tmp_path, model):
    with start(tmp_path, model, "stubborn") as server:
        processes = server.processes()
        server.process.kill()
        server.process.wait()
    assert len(processes) == 2
    assert gone(processes, 5)


def test_the_temporary_folder_of_the_server_goes_with_it(tmp_path, model, monkeypatch):
    with start(tmp_path, model) as server:
        folder = server.processes()[0].environ()["TMPDIR"]
        assert os.path.isdir(folder)
    assert "quantline-serve-" in folder
    assert not os.path.exists(folder)


def test_an_exception_inside_the_block_ends_the_server(tmp_path, model):
    block = start(tmp_path, model)
    processes = block.__enter__().processes()
    with pytest.raises(ZeroDivisionError):
        block.gen.throw(ZeroDivisionError())
    assert gone(processes, 0.1)


def test_a_busy_port_is_refused_before_anything_starts(tmp_path, model):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken; stop the process that listens on it"):
            start(tmp_path, model, port=port).__enter__()
    assert not (tmp_path / "logs").exists()
    require_free("127.0.0.1", port, "take another")


def test_a_folder_without_config_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        start(tmp_path, tmp_path).__enter__()


def test_a_server_that_dies_while_loading_is_noticed_at_once_with_its_reason(tmp_path, model):
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"ended with code 1 while loading .*ValueError: the weights are odd; log: "):
        start(tmp_path, model, "dies", startup_timeout_seconds=60.0).__enter__()
    assert time.monotonic() - began < 10


def test_an_interpreter_that_does_not_exist_is_a_server_error_with_its_log(tmp_path, model):
    with pytest.raises(ServerError, match="No such file or directory"):
        serve(tmp_path / "absent", model, sections.server(), log=tmp_path / "log").__enter__()


def test_a_server_that_is_never_ready_is_ended_at_the_timeout(tmp_path, model, capfd):
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ServerError, match=r"not ready after 1 s; raise serve.process.startup_timeout_seconds"):
        start(tmp_path, model, "never_ready", startup_timeout_seconds=1.0).__enter__()
    assert set(psutil.Process().children(recursive=True)) <= before
    assert "serving model on 127.0.0.1" in capfd.readouterr().err


def test_another_server_on_our_port_is_not_taken_for_ours(tmp_path, model):
    with pytest.raises(ServerError, match="belongs to another server, of /somewhere/else"):
        start(tmp_path, model, "other_root").__enter__()


OWNER = """
import sys, time
from pathlib import Path
sys.path[:0] = {source!r}
from quantline.serving.server import serve
from sections import server
with serve(Path({python!r}), Path({model!r}), server(environment={{"FAULT": {fault!r}}}), log=Path({log!r})):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.e2e
@pytest.mark.parametrize("fault", ["", "never_ready"], ids=["serving", "loading"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_when_the_owner_is_interrupted(root, tmp_path, model, fault, how):
    python, log = str(fake_server.interpreter(tmp_path)), str(tmp_path / "log")
    code = OWNER.format(
        source=[str(root / "src"), str(root / "tests/support")], python=python, model=str(model), fault=fault, log=log
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        if not fault:
            assert owner.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while len(found := psutil.Process(owner.pid).children(recursive=True)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        owner.send_signal(how)
        assert owner.wait(15) != 0
    assert len(found) >= 2
    assert gone(found)
