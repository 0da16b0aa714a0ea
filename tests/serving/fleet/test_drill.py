"""The fault drill on fakes, short; `python benchmarks/fleet_drill.py` is the long one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import fake_fleet
import httpx
import psutil
import pytest

from quantline.config.fleet import ShareConfig
from quantline.core.errors import ServerError, UserError
from quantline.serving.fleet import router
from quantline.serving.fleet.child import Child, wait_until
from quantline.serving.fleet.drill import FAKED, Drill, metrics, table
from quantline.serving.fleet.load import Load, run
from quantline.serving.fleet.orders import Order, give, is_running
from quantline.serving.fleet.running import RunningFleet

pytestmark = pytest.mark.toolchain("router")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with fake_fleet.up(tmp_path_factory.mktemp("fleet")) as up:
        yield up


def healthy(running):
    Drill(running, Load(running.fleet.url, "low", 1))._await_healthy()


def test_no_request_is_lost_before_the_first_byte_under_any_fault(running):
    drill = Drill(running, Load(running.fleet.url, "low", 60, streamed=0.5), fake_fleet.order(running))
    rows = {row.fault: row for row in drill.rows(FAKED)}
    assert {fault: (row.lost, row.quiet) for fault, row in rows.items()} == dict.fromkeys(FAKED, (0, 0))
    for fault in ("hang", "500", "429", "503"):
        assert rows[fault].retried > 0
    assert rows["kill -9"].elsewhere > 0
    assert metrics(list(rows.values()))["fleet_lost"] == 0
    assert "kill -9" in table(list(rows.values()))


def test_every_answer_says_who_gave_it_after_how_many_attempts_and_why(running):
    healthy(running)
    url = f"{running.fleet.url}/v1/chat/completions"

    def ask(model, **headers):
        body = {"model": model, "messages": [{"role": "user", "content": 'no "model": "high"'}]}
        answer = httpx.post(url, json=body, headers=headers, trust_env=False)
        told = [answer.headers[f"x-quantline-{name}"] for name in ("variant", "attempts", "reason", "asked")]
        return [*told, answer.json()["model"]]

    assert ask("low") == ["w4", "1", "first", "low", "w4"]
    assert ask("w8") == ["w8", "1", "first", "w8", "w8"]
    assert ask("low", **{"x-quantline-precision": "high"}) == ["float", "1", "first", "high", "float"]
    fake_fleet.order(running)("w4", "500")
    assert ask("low") == ["w8", "2", "retried", "low", "w8"]
    fake_fleet.order(running)("w4", "")


def test_what_cannot_be_answered_is_told_in_the_form_of_openai(running):
    def status(path, **given):
        answer = httpx.post(f"{running.fleet.url}{path}", trust_env=False, **given)
        return answer.status_code, answer.json()["error"]["message"]

    assert status("/v1/completions", json={"model": "w5"})[0] == 404
    assert "low, " in status("/v1/completions", json={"model": "w5"})[1]
    assert status("/v1/completions", json={"prompt": "x"})[0] == 400
    assert status("/v1/completions", content=b"{", headers={"content-type": "application/json"})[0] == 400
    assert status("/v1/load_lora_adapter", json={"model": "w4"})[0] == 404
    big = {"model": "low", "prompt": "x" * (9 * 2**20)}
    assert httpx.post(f"{running.fleet.url}/v1/completions", json=big, trust_env=False).status_code == 413
    listed = httpx.get(f"{running.fleet.url}/v1/models", trust_env=False).json()["data"]
    assert {card["id"] for card in listed} == {"high", "medium", "low", "float", "w8", "w4"}


@pytest.mark.parametrize("fault", ["breaks_stream", "hangs_in_stream"])
def test_a_stream_that_breaks_ends_with_an_error_and_never_quietly(running, fault):
    healthy(running)
    fake_fleet.order(running)("w4", fault)
    outcome = run(Load(running.fleet.url, "low", 4, streamed=1.0))
    fake_fleet.order(running)("w4", "")
    assert (outcome.broken, outcome.quiet, outcome.lost) == (4, 0, 0)


def test_a_client_that_hangs_up_stops_the_work_of_the_server(running):
    healthy(running)
    fake_fleet.order(running)("w4", "slow")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{running.fleet.url}/v1/completions", json={"model": "w4", "prompt": "x"}, timeout=0.3, trust_env=False
        )
    assert wait_until(lambda: fake_fleet.counts(running, "w4")["aborted"] == 1, 5)
    fake_fleet.order(running)("w4", "")


def test_a_second_fleet_of_the_same_name_and_a_change_of_what_is_fixed_are_refused(running):
    fleet, starts = running.fleet, [keeper.start for keeper in running.keepers.values()]
    with pytest.raises(UserError, match="a fleet of this name is running"):
        RunningFleet(fleet, running.program, starts).__enter__()
    other = fleet.model_copy(update={"capture_share": 0.5})
    with pytest.raises(UserError, match="cannot be changed while the fleet is up"):
        running.change(other)
    assert running.fleet == fleet
    assert run(Load(fleet.url, "low", 5)).lost == 0


def test_keys_that_cannot_be_read_and_a_port_that_is_taken_are_refused_before_a_server_starts(running, tmp_path):
    taken = fake_fleet.make(tmp_path / "a", endpoint=running.fleet.endpoint)
    keyless = fake_fleet.make(tmp_path / "b", keys_file=str(tmp_path / "none.yaml"))
    for (fleet, starts), words in ((taken, "is taken"), (keyless, "none.yaml: No such file")):
        with pytest.raises(UserError, match=words):
            RunningFleet(fleet, running.program, starts).__enter__()
    assert not list(tmp_path.glob("*/*.log"))
    assert run(Load(running.fleet.url, "low", 5)).lost == 0


def test_a_change_that_the_router_does_not_take_in_time_is_taken_back(running, monkeypatch):
    healthy(running)
    plain = router.admin
    monkeypatch.setattr(router, "admin", lambda fleet, _seconds=0.2: plain(fleet, 0.2))
    monkeypatch.setattr(router, "APPLIED_SECONDS", 0.2)
    canary = ShareConfig(precision="low", variant="float", share=1.0)
    envoy = psutil.Process(running.router.child.pid)
    envoy.suspend()
    try:
        with pytest.raises(ServerError, match="did not take clusters"):
            running.change(running.fleet.model_copy(update={"canary": canary}))
    finally:
        envoy.resume()
    monkeypatch.undo()
    healthy(running)
    assert dict(run(Load(running.fleet.url, "low", 20)).variants) == {"w4": 20}


PARENT = """
import sys, pathlib
import fake_fleet
from quantline.serving.fleet.running import RunningFleet
with fake_fleet.up(pathlib.Path(sys.argv[1])) as running:
    print("up", flush=True)
    running.stay()
"""


def parent(folder):
    path = os.pathsep.join(["src", ".", "tests/support"])
    command = [sys.executable, "-c", PARENT, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, text=True)
    assert process.stdout.readline() == "up\n"
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.e2e
def test_orders_of_another_process_are_followed_and_no_process_is_left_however_it_ends(tmp_path):
    process, below = parent(tmp_path)
    folder = tmp_path / "state"
    assert len(below) == 10  # three servers, gauge and router, each with its supervisor
    give(folder, Order(number=1, end=True))
    assert process.wait(20) == 0
    assert psutil.wait_procs(below, timeout=0.1)[1] == []
    assert not is_running(folder)
    with pytest.raises(UserError, match="no fleet runs"):
        give(folder, Order(number=2, end=True))
    process, below = parent(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(below, timeout=15)[1] == []


def test_a_server_that_does_not_start_ends_the_fleet_with_its_reason(tmp_path, root):
    fleet, starts = fake_fleet.make(tmp_path)
    broken = starts[1].model_copy(update={"python": sys.executable})
    with pytest.raises(ServerError, match="w8: the server ended"):
        RunningFleet(fleet, fake_fleet.envoy(root), [starts[0], broken, starts[2]]).__enter__()
    assert not [child for child in psutil.Process().children() if str(tmp_path) in " ".join(child.cmdline())]


def test_a_child_ends_with_its_supervisor(tmp_path):
    child = Child("a sleeper", [sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    assert wait_until(lambda: child.pid is not None, 5)
    inner = psutil.Process(child.pid)
    child.end()
    assert not inner.is_running()
    with pytest.raises(ServerError, match="a sleeper"):
        child.require_alive("sleeping")
