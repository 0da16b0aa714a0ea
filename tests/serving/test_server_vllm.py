"""The real server: one for all checks of this file but those of a server that does not come up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import httpx
import numpy as np
import psutil
import pytest
import sections
from checkout_paths import DEMO_MODEL as MODEL
from checkout_paths import interpreter

from quantline.checkpoints.model_files import has_chat_template
from quantline.core.errors import ServerError, UserError
from quantline.lifecycle.shadow import tokens_of
from quantline.serving.answer_checks import judge_answers
from quantline.serving.continuations import continue_greedily
from quantline.serving.fleet.captures import Capture
from quantline.serving.fleet.observe import metrics
from quantline.serving.logprobs import score
from quantline.serving.rules import Target, facts_of, verdict
from quantline.serving.server import serve
from quantline.serving.smoke import run_smoke
from quantline.toolchains.toolchain import worker_environment

PYTHON = interpreter("vllm")
REFERENCE = interpreter("reference")
# One thread that is bound to no core: others may be busy on these.
OPTIONS = sections.server(dtype="bfloat16", max_model_len=513, kv_cache_gib=0.25, threads=1)

pytestmark = [
    pytest.mark.toolchain("vllm"),
    pytest.mark.toolchain("reference"),
    pytest.mark.skipif(not MODEL.exists(), reason="the demo model is not there"),
]

# What transformers says of the same windows; the weights are bfloat16, its arithmetic is float32.
SCORE = """
import json, sys, numpy, torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
model, texts, out = sys.argv[1:]
tokenizer = Tokenizer.from_file(model + "/tokenizer.json")
ids = [i for line in open(texts) for i in [*tokenizer.encode(json.loads(line)["text"]).ids, 0]][: 16 * 512]
windows = torch.tensor(ids).reshape(16, 512)
network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
with torch.no_grad():
    scores = network(windows).logits[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
    prompts, tokens, margins = windows[:6, :48], [], []
    grown = prompts
    for _ in range(12):
        best = network(grown).logits[:, -1].topk(2)
        tokens.append(best.indices[:, 0])
        margins.append(best.values[:, 0] - best.values[:, 1])
        grown = torch.cat([grown, tokens[-1][:, None]], dim=1)
greedy = {"prompts": prompts.numpy(), "tokens": torch.stack(tokens, 1).numpy(), "margins": torch.stack(margins, 1).numpy()}
numpy.savez(out, windows=windows.numpy(), scores=scores.numpy(), **greedy)
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def stack():
    with ExitStack() as held:
        yield held


@pytest.fixture(scope="module")
def server(stack, logs):
    return stack.enter_context(serve(PYTHON, MODEL, OPTIONS, log=logs / "server.log"))


def test_the_real_server_passes_the_smoke_and_reports_what_it_costs(server):
    assert has_chat_template(MODEL)
    prompts = ["The CREATE INDEX command", "In Python, a list"]
    report = run_smoke(server, prompts, ["What is a savepoint?"], max_tokens=24, timeout_seconds=60)
    assert report.faults == ()
    assert [answer.kind for answer in report.answers] == ["completion", "completion", "chat"]
    assert judge_answers(report.answers, report.answers) == []
    assert all(0 < answer.token_count <= 24 for answer in report.answers)
    assert report.metrics["load_seconds"] > 5
    assert 1e8 < report.metrics["rss_bytes"] < 2e10
    assert 0 < report.metrics["time_to_first_token_seconds"] < report.metrics["latency_seconds"] * 2
    assert report.runtime_version.startswith("0.")
    assert report.kernels == ()
    print(report.metrics)


def test_captured_requests_become_tokens_of_which_the_answers_are_scored(server):
    asked = [{"role": "user", "content": "What is an index?"}]
    chat = Capture("1", "low", "w4", asked, None, "An index is a list.", 200)
    long = Capture("2", "low", "w4", None, "word " * 600, "too long", 200)
    found = [chat, Capture("3", "low", "w4", None, "An index is", " a list.", 200), long]
    kept = tokens_of(server, found, server.max_model_len)
    assert [one.capture.id for one in kept] == ["1", "3"]
    assert tokens_of(server, found, 3) == []  # what another server does not take is left out, too
    assert all(1 < one.prompt < len(one.ids) for one in kept)
    answers = [
        values[one.prompt - 1 :] for values, one in zip(score(server, [one.ids for one in kept]), kept, strict=True)
    ]
    assert [len(values) for values in answers] == [len(one.ids) - one.prompt for one in kept]


def test_every_metric_that_alerts_and_dashboard_of_a_fleet_read_is_in_a_scrape(server):
    scraped = server.client().get("/metrics").text
    named = {name for name in metrics() if name.startswith("vllm:")}
    assert len(named) > 6
    assert [name for name in sorted(named) if f"\n{name}{{" not in scraped] == []


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    """What transformers says."""
    texts, out = root / "assets" / "demo" / "evaluation.jsonl", tmp_path_factory.mktemp("reference") / "reference.npz"
    subprocess.run(
        [REFERENCE, "-c", SCORE, str(MODEL), str(texts), str(out)], check=True, env=worker_environment(1), cwd=root
    )
    return np.load(out)


def test_the_server_continues_tokens_as_transformers_does_wherever_it_is_no_near_tie(server, reference):
    prompts = reference["prompts"].tolist()
    found = continue_greedily(server, prompts, 12, concurrency=4, timeout_seconds=120)
    assert found["prompts"] == prompts
    compared = 0
    for mine, margins, theirs, expected in zip(
        found["tokens"], found["margins"], reference["tokens"], reference["margins"], strict=True
    ):
        for token, margin, other, wanted in zip(mine, margins, theirs, expected, strict=True):
            if min(margin, wanted) < 0.25:  # bfloat16 may decide otherwise, and all that follows is of another text
                break
            assert token == other
            assert margin == pytest.approx(wanted, abs=0.2)
            compared += 1
    assert compared > 20


def test_scores_through_the_server_agree_with_transformers(server, reference):
    began = time.perf_counter()
    scores = np.stack(score(server, list(reference["windows"]), concurrency=8))
    print(f"{scores.size / (time.perf_counter() - began):.0f} tokens a second")
    ours, theirs = -scores.mean(), -reference["scores"].mean()
    print(f"mean loss {ours:.5f}, transformers {theirs:.5f}, median gap {np.median(abs(scores - reference['scores']))}")
    assert 1.5 < theirs < 4
    assert abs(ours / theirs - 1) < 0.01
    assert np.median(np.abs(scores - reference["scores"])) < 0.05
    alone = np.stack(score(server, list(reference["windows"][:2]), concurrency=1))
    assert abs(alone.mean() / scores[:2].mean() - 1) < 1e-3


def test_a_window_as_long_as_the_server_takes_is_scored_and_a_longer_one_refused(server):
    assert server.max_model_len == 513
    (found,) = score(server, [[5] * 512])
    assert found.shape == (511,)
    with pytest.raises(UserError, match="one less than the server's max_model_len=513"):
        score(server, [[5] * 513])


def test_a_token_outside_the_vocabulary_is_refused_by_name(server):
    with pytest.raises(ServerError, match="out of vocabulary"):
        score(server, [[5, 6, 1_000_000]])


def test_the_port_of_a_running_server_is_busy(server, logs):
    taken = sections.server(port=server.port)
    with pytest.raises(UserError, match=f"port {server.port} of 127.0.0.1 is taken"):
        serve(PYTHON, MODEL, taken, log=logs / "second.log").__enter__()
    assert server.client().get("/health").status_code == httpx.codes.OK


def test_ctrl_c_while_serving_leaves_no_process(server, stack):
    """The last check of the shared server: it ends it."""
    processes, owned = server.processes(), stack.pop_all()
    assert {process.name() for process in processes} >= {"VLLM::EngineCore", "VLLM::Worker"}
    folder = processes[0].environ()["TMPDIR"]
    with pytest.raises(KeyboardInterrupt):
        interrupted_within(owned)
    assert "/v1/completions HTTP" not in server.log_text()
    assert psutil.wait_procs(processes, timeout=0.1)[1] == []
    assert not os.path.exists(folder)


def interrupted_within(owned: ExitStack) -> None:
    with owned:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_a_checkpoint_that_vllm_refuses_ends_the_real_server_with_its_reason(tmp_path):
    """The refusal comes before weights are read, so that none need be quantized; the rules know it without a start."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": False}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ServerError, match=r"while loading .*Unsupported quantization config: bits=4, sym=False"):
        serve(PYTHON, folder, OPTIONS, log=tmp_path / "log").__enter__()
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not verdict(Target("vllm", "0.32.0", "cpu"), facts_of(quantization)).supported


OWNER = """
from pathlib import Path
from quantline.serving.server import serve
from sections import server
with serve(Path({python!r}), Path({model!r}), server(dtype="bfloat16", kv_cache_gib=0.25), log=Path({log!r})):
    raise SystemExit("it was to be interrupted while loading")
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_of_the_real_server_is_left_when_its_owner_ends_while_it_loads(root, tmp_path, how):
    code = OWNER.format(python=str(PYTHON), model=str(MODEL), log=str(tmp_path / "log"))
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests' / 'support'}"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as owner:
        found, deadline = [], time.monotonic() + 90
        # The server's own process, its resource tracker and the engine's process: vLLM has begun to load.
        while len(found) < 4 and time.monotonic() < deadline and owner.poll() is None:
            found = psutil.Process(owner.pid).children(recursive=True)
            time.sleep(0.1)
        owner.send_signal(how)
        assert owner.wait(30) != 0
    assert len(found) >= 4
    assert psutil.wait_procs(found, timeout=20)[1] == []
