"""Servers that stay up from one stage to the next: the same one is taken over, and none outlives its owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import fake_server
import psutil
import pytest
import sections

from quantline.core.errors import ServerError
from quantline.serving import process_tree
from quantline.serving.handover import end_all
from quantline.serving.keeping import Keeping, kept_of
from quantline.serving.server import serve

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def owner(tmp_path, monkeypatch):
    """A process on whose behalf servers are kept."""
    monkeypatch.setattr(process_tree.tempfile, "tempdir", None)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        end_all(process.pid)
        process.kill()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def start(tmp_path, model, owner, monkeypatch):
    # A tiny checkpoint without weights takes no memory worth a word.
    monkeypatch.setattr("quantline.serving.handover.server_bytes", lambda *_: 0)

    def started(stage, *, role="variant", content="abc", fault="", onward=True, fresh=False, **options):
        chosen = sections.server(environment={"FAULT": fault}, **{"startup_timeout_seconds": 20.0, **options})
        keeping = Keeping(owner.pid, role, content, stage, onward, fresh)
        log = tmp_path / f"{stage}-{role}.log"
        return serve(fake_server.interpreter(tmp_path), model, chosen, log=log, keeping=keeping)

    return started


def waiting(owner):
    return sorted(kept.known["role"] for kept in kept_of(owner.pid))


def eventually(holds, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def until_waiting(owner, *roles):
    assert eventually(lambda: waiting(owner) == sorted(roles)), waiting(owner)


def test_a_stage_takes_over_the_server_of_the_one_before_with_its_load_time_and_its_log(start, owner, capfd):
    with start("smoke") as first:
        processes = first.processes()
    until_waiting(owner, "variant")
    with start("tasks") as second:
        assert waiting(owner) == []
        assert second.processes() == processes
        assert (second.taken_over, second.load_seconds, second.log) == ("smoke", first.load_seconds, first.log)
        assert second.client().get("/version").json() == {"version": "0.0.1"}
        assert "taking over the server of model from smoke" in capfd.readouterr().err
    until_waiting(owner, "variant")
    with start("speed", onward=False) as third:
        assert third.processes() == processes
        assert third.taken_over == "smoke"
    assert psutil.wait_procs(processes, timeout=1)[1] == []
    assert not first.taken_over


def test_what_a_library_puts_into_the_environment_of_one_stage_makes_no_other_server(start, owner, monkeypatch):
    with monkeypatch.context() as only_here:
        only_here.setenv("A_LIBRARY_WARNS", "0")
        with start("smoke"):
            pass
    until_waiting(owner, "variant")
    with start("tasks") as second:
        assert second.taken_over == "smoke"


@pytest.mark.parametrize(
    "other", [{"content": "other"}, {"max_model_len": 8}, {"fresh": True}], ids=["checkpoint", "arguments", "fresh"]
)
def test_another_checkpoint_and_other_arguments_get_a_server_of_their_own_and_the_former_ends(start, owner, other):
    with start("smoke") as first:
        processes = first.processes()
    until_waiting(owner, "variant")
    with start("tasks", **other) as second:
        assert not second.taken_over
        assert psutil.wait_procs(processes, timeout=0.1)[1] == []
        assert second.log != first.log


def test_the_float_models_server_stays_while_those_of_variants_come_and_go(start, owner):
    with start("smoke", role="float") as first:
        processes = first.processes()
    for content in ("one", "two"):
        with start("smoke", content=content) as own:
            assert not own.taken_over
    until_waiting(owner, "float", "variant")
    with start("speed", role="float") as again:
        assert again.processes() == processes
    end_all(owner.pid, "variant")
    until_waiting(owner, "float")


def test_two_models_on_one_port_are_not_served_at_once(start, owner, monkeypatch):
    with start("smoke", role="float") as first:
        port = first.port
    until_waiting(owner, "float")
    with start("smoke", port=port) as second:
        assert second.port == port
        assert waiting(owner) == []


def test_without_memory_for_both_the_one_that_waits_makes_room(start, owner, monkeypatch):
    with start("smoke", role="float"):
        pass
    until_waiting(owner, "float")
    monkeypatch.setattr("quantline.serving.handover.server_bytes", lambda *_: 1e18)
    with start("smoke"):
        assert waiting(owner) == []


def test_a_stage_that_fails_hands_nothing_on(start, owner):
    processes = []

    def stage():
        with start("smoke") as server:
            processes.extend(server.processes())
            raise RuntimeError("a fault of the stage")

    with pytest.raises(RuntimeError, match="a fault of the stage"):
        stage()
    assert processes
    assert psutil.wait_procs(processes, timeout=0.1)[1] == []
    assert waiting(owner) == []


def test_a_server_that_died_while_it_waited_is_started_anew(start, owner):
    with start("smoke") as first:
        (leader,) = first.processes()
    until_waiting(owner, "variant")
    leader.kill()
    until_waiting(owner)
    with start("tasks") as second:
        assert not second.taken_over


def test_a_server_that_was_taken_over_and_dies_is_reported_with_its_code(start, owner):
    with start("smoke"):
        pass
    until_waiting(owner, "variant")
    with start("tasks") as second:
        (leader,) = second.processes()
        leader.kill()
        second.process.wait(10)
        with pytest.raises(ServerError, match=r"was killed \(out of memory\?\) while testing"):
            second.require_alive("testing")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_once_the_owner_has_ended(start, owner, how):
    with start("smoke", fault="stubborn") as server:
        processes = server.processes()
        supervisor = psutil.Process(server.process.pid)
    until_waiting(owner, "variant")
    (kept,) = kept_of(owner.pid)
    owner.send_signal(how)
    owner.wait()
    server.process.wait(15)
    assert psutil.wait_procs([*processes, supervisor], timeout=0.1)[1] == []
    assert not kept.folder.exists()


def test_a_server_that_nobody_asks_for_ends(tmp_path, model, owner):
    """The supervisor by itself, since its patience is a constant."""
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(process_tree.__file__)!r}); import process_tree; "
        f"process_tree.IDLE_SECONDS = 0.5; sys.exit(process_tree._run(1.0, {owner.pid}, ['sleep', '600']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        note = json.dumps({"owner": owner.pid, "role": "variant"}).encode()
        process.stdin.write(b"+k" + note + b"\n")
        process.stdin.flush()
        until_waiting(owner, "variant")
        assert process.wait(15) == 128 + signal.SIGTERM
    assert waiting(owner) == []


def test_a_line_of_another_owner_is_not_looked_at(start, owner):
    with start("smoke"):
        pass
    until_waiting(owner, "variant")
    assert list(kept_of(owner.pid + 1)) == []
