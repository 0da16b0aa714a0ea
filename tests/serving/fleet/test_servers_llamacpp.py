"""A fleet whose first variant is a GGUF file behind the real llama.cpp; the float model behind it is a fake."""

from __future__ import annotations

from dataclasses import replace

import fake_fleet
import httpx
import pytest
import sections
from demo_gguf import demo_gguf, runner

from quantline.serving.command import ServerOptions
from quantline.serving.fleet import gauge
from quantline.serving.fleet.child import wait_until
from quantline.serving.fleet.drill import DRAIN, HANG, KILL, QUEUE, Drill
from quantline.serving.fleet.load import Load, run
from quantline.serving.fleet.running import RunningFleet
from quantline.serving.fleet.servers import Start
from quantline.serving.ports import free_port
from quantline.toolchains import environments

pytestmark = [pytest.mark.toolchain("llamacpp"), pytest.mark.toolchain("router"), pytest.mark.timeout(600)]

GGUF = "gguf-q4"


@pytest.fixture(scope="module")
def running(root, tmp_path_factory):
    place = tmp_path_factory.mktemp("fleet")
    checkpoint = demo_gguf(root, runner(root, place), tmp_path_factory.mktemp("gguf"))
    chains = {"low": (GGUF, "float"), "only": (GGUF,)}
    made, starts = fake_fleet.make(place, precisions={"low": ("float",), "only": ("w8",)}, hang_seconds=2.0)
    port = free_port("127.0.0.1")
    own = made.variant("w8").model_copy(
        update={"name": GGUF, "port": port, "runtime": "llamacpp", "weight_bytes": 7, "queued_requests": 4}
    )
    fleet = made.model_copy(update={"variants": (own, made.variant("float")), "precisions": chains})
    process = sections.server(max_num_seqs=2, startup_timeout_seconds=60.0).process
    options = ServerOptions(process.model_copy(update={"port": port}), max_model_len=200, runtime="llamacpp", threads=1)
    start = Start(
        names=(GGUF, "low", "only"), python=str(environments.ensure(root, "llamacpp").python), folder=str(checkpoint),
        log=str(place / "gguf.log"), server=options,
    )  # fmt: skip
    others = [one for one in starts if one.names[0] == "float"]
    with RunningFleet(fleet, fake_fleet.envoy(root), [start, *others]) as up:
        yield up


def ask(running, path="/v1/completions", **body):
    answer = httpx.post(
        f"{running.fleet.url}{path}", json={"prompt": "An index is", **body}, trust_env=False, timeout=60
    )
    return answer, answer.headers.get("x-quantline-variant"), answer.headers.get("x-quantline-reason")


def healthy(running):
    Drill(running, Load(running.fleet.url, "low", 1, completions=True))._await_healthy()


def test_llama_cpp_answers_every_name_with_its_own(running):
    healthy(running)
    for name in ("low", "only", GGUF):
        answer, variant, reason = ask(running, model=name, max_tokens=4)
        assert (answer.status_code, variant, reason, answer.json()["model"]) == (200, GGUF, "first", GGUF)
        assert answer.json()["usage"]["completion_tokens"] == 4
    with httpx.stream("POST", f"{running.fleet.url}/v1/completions", trust_env=False, json={
        "model": "low", "prompt": "An index is", "max_tokens": 4, "stream": True,
    }) as answer:  # fmt: skip
        assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"


@pytest.mark.parametrize(
    "body", [{"echo": True, "logprobs": 1}, {"prompt_logprobs": 0}, {"path": "/tokenize"}, {"path": "/v1/embeddings"}]
)
def test_what_llama_cpp_would_answer_otherwise_goes_to_vllm_or_is_refused(running, body):
    healthy(running)
    _, variant, reason = ask(running, model="low", **body)
    assert (variant, reason) == ("float", "runtime")
    for name in ("only", GGUF):
        answer, variant, _ = ask(running, model=name, **body)
        assert (answer.status_code, variant) == (400, None)
        assert "no log-probabilities of a prompt" in answer.json()["error"]["message"]


def test_false_and_null_of_such_options_keep_a_request_on_llama_cpp(running):
    healthy(running)
    assert ask(running, model="low", max_tokens=1, echo=False, prompt_logprobs=None)[1] == GGUF


def test_its_metrics_are_the_gauges_and_move_while_it_computes(running):
    healthy(running)
    variant = running.fleet.variant(GGUF)
    text = httpx.get(f"http://{variant.address}/metrics", trust_env=False).text
    names = gauge.METRICS["llamacpp"]
    assert {names.running, names.waiting, *names.tokens} <= set(gauge.read_metrics(text))
    before = gauge.seen_in(text, "llamacpp")
    ask(running, model=GGUF, max_tokens=8)
    after = gauge.seen_in(httpx.get(f"http://{variant.address}/metrics", trust_env=False).text, "llamacpp")
    assert after.tokens >= before.tokens + 8
    assert gauge.seen_in(text, "vllm").tokens is None


def test_no_request_is_lost_by_faults_of_llama_cpp_and_it_is_the_first_again(running):
    load = Load(running.fleet.url, "low", 60, 4, max_tokens=16, completions=True, least_seconds=5)
    rows = {row.fault: row for row in Drill(running, load).rows((KILL, HANG, DRAIN))}
    assert {fault: (row.lost, row.broken) for fault, row in rows.items()} == dict.fromkeys(rows, (0, 0))
    assert all(row.elsewhere and row.back_seconds is not None for row in rows.values())
    assert running.keepers[GGUF].starts > 1


def test_a_full_queue_sends_requests_to_the_next_variant_and_lets_none_go(running):
    load = Load(
        running.fleet.url, "low", 60, 12, max_tokens=150, completions=True, extra={"ignore_eos": True}, least_seconds=5
    )
    (full,) = Drill(running, load).rows((QUEUE,))
    assert (full.lost, full.broken) == (0, 0)
    assert full.elsewhere > 0
    assert full.back_seconds < 5


def test_a_variant_that_leaves_ends_when_it_is_idle(running):
    healthy(running)
    keeper = running.keepers[GGUF]
    assert running._is_idle(keeper)
    seen = []
    load = Load(running.fleet.url, GGUF, 8, 4, max_tokens=150, completions=True, extra={"ignore_eos": True})
    run(load, lambda: seen.append(wait_until(lambda: not running._is_idle(keeper), 5, 0.01)))
    assert seen == [True]
    assert wait_until(lambda: running._is_idle(keeper), 10)


def test_threads_of_a_fleet_come_after_those_that_were_proven(running):
    start = running.keepers[GGUF].start
    proven = replace(start.server, proven=("--parallel", "2", "--threads", "7"), threads=1)
    flags = start.model_copy(update={"server": proven}).options().proven
    assert flags == ("--parallel", "2", "--threads", "7", "--threads", "1")
