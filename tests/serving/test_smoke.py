from __future__ import annotations

import time

import psutil
import pytest

from quantline.core.errors import ServerError, UserError
from quantline.serving.smoke import Answer, read_counter, run_smoke


def smoke(server, **options):
    return run_smoke(server, ["a", "b"], ["c"], max_tokens=3, **{"timeout_seconds": 10.0, **options})


def test_a_good_server_has_no_faults_and_its_answers_and_metrics_are_reported(start):
    with start() as server:
        report = smoke(server)
    assert report.faults == ()
    assert report.answers == tuple(
        Answer(kind, prompt, "one two three", 3, "length")
        for kind, prompt in [("completion", "a"), ("completion", "b"), ("chat", "c")]
    )
    assert report.runtime_version == "0.0.1"
    assert set(report.metrics) == {
        "load_seconds", "time_to_first_token_seconds", "latency_seconds", "output_tokens_per_second", "rss_bytes",
    }  # fmt: skip
    assert all(value > 0 for value in report.metrics.values())


@pytest.mark.parametrize(
    ("fault", "says", "count"),
    [
        ("streams_otherwise", "streamed 'one two four' (3 tokens, length), whole 'one two three'", 3),
        ("counts_wrongly", "vllm:generation_tokens_total grew by 26, the answers had 19 tokens", 1),
        ("no_counters", "/metrics has no vllm:prompt_tokens_total", 2),
        ("other_name", "/v1/models lists ['quantline', 'stranger']", 1),
    ],
)
def test_a_fault_of_the_server_is_reported(start, fault, says, count, monkeypatch):
    monkeypatch.setattr("quantline.serving.smoke.COUNTER_PATIENCE_SECONDS", 0.1)
    with start(fault) as server:
        faults = smoke(server).faults
    assert len(faults) == count
    assert says in faults[0]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("dies_on_answers", "ended with code 5 while answering: RuntimeError: out of ideas"),
        ("refuses", "POST /v1/completions: 400 .*not today"),
        ("not_json", "answer cannot be read"),
        ("breaks_stream", "the stream ended early, after 3 pieces"),
    ],
)
def test_a_server_that_does_not_answer_is_an_error(start, fault, says):
    with start(fault) as server, pytest.raises(ServerError, match=says):
        smoke(server)


def test_a_server_that_hangs_is_given_up_and_ended(start):
    began = time.monotonic()
    with start("hangs_on_answers") as server:
        processes = server.processes()
        with pytest.raises(ServerError, match=r"did not answer /v1/completions in time"):
            smoke(server, timeout_seconds=0.5)
    assert psutil.wait_procs(processes, timeout=0.1)[1] == []
    assert time.monotonic() - began < 20


def test_smoke_without_prompts_is_a_user_error(start):
    with start() as server, pytest.raises(UserError, match="none given"):
        run_smoke(server, [])


def test_a_counter_is_summed_over_its_labels():
    samples = 'x_total{a="}1"} 2.0\nx_total{a="2"} 3.5\nx_total_created{a="1"} 99\nbare 7\n'
    text = f"# HELP x_total y\n# TYPE x_total counter\n{samples}"
    assert read_counter(text, "x_total") == 5.5
    assert read_counter(text, "bare") == 7
    assert read_counter(text, "absent") is None
    with pytest.raises(ValueError, match="metric name"):
        read_counter("<html>no metrics</html>\n", "x_total")
