from __future__ import annotations

import json
import subprocess
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from variant_records import record

import tests.lifecycle.tracking.test_writer as test_tracking
from quantline.core.errors import TrackingError
from quantline.lifecycle.tracking.datasets import datasets_of, system_samples
from quantline.pipeline import git as git_module
from tests.lifecycle.tracking.test_writer import _fails_at, baseline, dump, runs_of, to

pytestmark = pytest.mark.e2e

database, store = test_tracking.database, test_tracking.root  # fixtures
TOKENS = "1f" * 32
WINDOWS = "2e" * 32
MANIFEST = {
    "input_ids_sha256": TOKENS, "total_tokens": 16384, "options": {"n_samples": 32, "seq_len": 512},
    "sources": {"demo": {"file": "calibration.jsonl", "file_sha256": "ab" * 32}}, "tokenizer_sha256": "cd" * 32,
}  # fmt: skip
MONITOR = {
    "interval_seconds": 2.0, "columns": ["seconds", "cpu_percent", "gpu_0_memory_used_bytes"],
    "samples": [[0.0, 150.0, 1e9], [2.0, 175.5, None], [4.0, 190.0, 2e9]],
}  # fmt: skip


def measured(store: Path, name: str):
    """A variant whose calibration and evaluation say which tokens they read, and whose quantization was watched."""
    variant = record(name, "gptq", 4, 0.01, store / "work")
    (variant.folder / "calibrate" / "manifest.json").write_text(json.dumps(MANIFEST))
    windows = {"protocol": {"mode": "documents", "window": 512}, "sha256": WINDOWS, "windows": 3, "tokens": 900,
               "scored_tokens": 850, "document_ids": ["a", "b"]}  # fmt: skip
    for stage in ("serve_smoke", "evaluate"):
        (variant.folder / stage / "windows.json").write_text(json.dumps(windows))
    for result in variant.results:
        if result["stage"] == "calibrate":
            result["files"] = ["calibrate/manifest.json"]
        if result["stage"] in ("serve_smoke", "evaluate"):
            (variant.folder / result["stage"] / "documents.jsonl").write_text("{}\n")
            result["files"] = [f"{result['stage']}/documents.jsonl"]
        if result["stage"] == "quantize":
            result["monitor"] = MONITOR
    variant.config["evaluate"]["name"] = "perplexity"
    return variant


def uses(run):
    return {
        (use.dataset.name, use.dataset.digest, tag.value)
        for use in run.inputs.dataset_inputs
        for tag in use.tags
        if tag.key == "mlflow.data.context"
    }


def test_a_variant_has_the_tokens_it_was_calibrated_and_judged_on_as_datasets_known_by_their_hash(store):
    to(store, [measured(store, "one"), measured(store, "two")])
    runs = runs_of(store)
    calibration = ("calibration: demo", TOKENS[:36], "calibration")
    evaluation = ("evaluation: perplexity", WINDOWS[:36], "evaluation")
    assert uses(runs["one"]) == uses(runs["two"]) == {calibration, evaluation}
    assert uses(runs["one: calibrate"]) == {calibration}
    assert uses(runs["one: evaluate"]) == uses(runs["one: serve_smoke"]) == {evaluation}
    assert uses(runs["one: convert"]) == set()
    (use,) = runs["one: calibrate"].inputs.dataset_inputs
    assert json.loads(use.dataset.source)["demo"]["file"] == "calibration.jsonl"
    assert json.loads(use.dataset.profile)["input_ids_sha256"] == TOKENS


def test_a_long_stage_has_its_system_metrics_by_step_and_time(store):
    from mlflow import MlflowClient

    to(store, [measured(store, "one")])
    child = runs_of(store)["one: quantize"]
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    history = client.get_metric_history(child.info.run_id, "system/cpu_percent")
    assert [(point.step, point.value) for point in history] == [(0, 150.0), (1, 175.5), (2, 190.0)]
    assert [point.timestamp - child.info.start_time for point in history] == [0, 2000, 4000]
    memory = client.get_metric_history(child.info.run_id, "system/gpu_0_memory_used_bytes")
    assert [point.value for point in memory] == [1e9, 2e9]
    assert not any(key.startswith("system/") for key in runs_of(store)["one"].data.metrics)


def test_datasets_and_system_metrics_are_logged_once_however_often_a_publish_is_cut_off(store, monkeypatch):
    from mlflow import MlflowClient

    variant = measured(store, "one")
    for call in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_inputs", _fails_at(MlflowClient.log_inputs, call, True))
            with pytest.raises(TrackingError, match="cut off"):
                to(store, [variant])
    to(store, [variant])
    before = dump(store)
    assert to(store, [variant]).unchanged == ("one",)
    assert dump(store) == before
    history = [row for row in before["metrics"] if "system/cpu_percent" in row]
    assert len(history) == 3
    assert len(runs_of(store)["one"].inputs.dataset_inputs) == 2


def test_a_log_is_attached_and_a_publish_from_a_machine_without_it_changes_nothing(store):
    here = baseline(store)
    for result in here.results:
        log = here.folder / f"{result['stage']}.log"
        log.write_text("said")
        result["log"] = log.name
    to(store, [here])
    folder = Path(runs_of(store)["float: evaluate"].info.artifact_uri.removeprefix("file://"))
    assert (folder / "evaluate.log").read_text() == "said"
    before = dump(store)
    there = replace(here, results=[{**result, "log": None} for result in here.results])
    assert to(store, [there]).unchanged == ("float",)
    assert dump(store) == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"input_ids_sha256": 3}'])
def test_a_damaged_manifest_gives_no_dataset(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert datasets_of({"stage": "calibrate", "files": ["manifest.json"]}, {}, tmp_path) == ()


@pytest.mark.parametrize("monitor", [None, [], {}, {"columns": ["seconds"], "samples": [[1.0]]}])
def test_a_result_without_samples_has_no_system_metrics(monitor):
    assert system_samples({"stage": "quantize", "monitor": monitor}) == ()


def test_the_patch_of_a_changed_checkout_is_an_artifact_without_secrets(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted4711")
    checkout = tmp_path / "checkout"
    checkout.mkdir()

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=checkout, check=True, capture_output=True)

    git("init", "-q")
    (checkout / "conf.yaml").write_text("bits: 4\n")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    assert git_module.patch_of(checkout) is None
    (checkout / "conf.yaml").write_text("bits: 8\ntoken: hf_planted4711\n")
    patch = git_module.patch_of(checkout)
    assert "-bits: 4\n+bits: 8\n" in patch
    to(store, [replace(baseline(store), dirty=True, patch=patch)])
    run = runs_of(store)["float"]
    assert run.data.tags["quantline.dirty"] == "true"
    kept = Path(run.info.artifact_uri.removeprefix("file://"), "dirty.patch").read_text()
    assert kept == patch.replace("hf_planted4711", "***")
    monkeypatch.setattr(git_module, "MAX_PATCH_CHARS", 50)
    assert "conf.yaml" in git_module.patch_of(checkout)
    assert "bits: 8" not in git_module.patch_of(checkout)


class Answers(BaseHTTPRequestHandler):
    """A tracking server that answers everything alike, after a while."""

    code, wait = 401, 0.0

    def answer(self):
        time.sleep(0 if self.path == "/health" else self.wait)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b"You are not authenticated."
        if self.code == 200:
            experiment = {"experiment_id": "1", "name": "x", "lifecycle_stage": "active", "tags": []}
            body = json.dumps({"experiment": experiment, "runs": []}).encode()
        self.send_response(200 if self.path == "/health" else self.code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def answering():
    servers = []

    def start(code, wait=0.0):
        handler = type("Handler", (Answers,), {"code": code, "wait": wait})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("code", [401, 403])
def test_a_server_that_refuses_the_credentials_is_an_error_at_once_without_them(store, monkeypatch, answering, code):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw-4711-pw")
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=str(code)) as caught:
        to(store, [baseline(store)], uri=f"http://ann:pw-4711-pw@{answering(code)}", timeout_seconds=5)
    assert time.monotonic() - begun < 15
    assert "pw-4711-pw" not in str(caught.value)
    assert "python -m stages.publish" in str(caught.value)


def test_a_server_that_is_slow_is_given_up_when_the_time_that_a_stage_waits_is_over(store, answering):
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=r"it is slow, not done after 1 s"):
        to(store, [baseline(store)], uri=f"http://{answering(200, wait=0.6)}", timeout_seconds=5, limit_seconds=1)
    assert time.monotonic() - begun < 15
