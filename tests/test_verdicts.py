from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantline.checkpoint import write_safetensors
from quantline.errors import QuantlineError, UserError
from quantline.evaluation import load_server_scores, read_documents
from quantline.jobs import JobResult, write_json
from quantline.verdicts import Bootstrap, evaluate
from quantline.windows import Windows

DOCUMENTS, LENGTH = 12, 9
BOOTSTRAP = Bootstrap(resamples=200, level=0.95, seed=0)


def windows_of(seed=0):
    ids = np.random.default_rng(seed).integers(0, 50, DOCUMENTS * LENGTH).astype(np.int32)
    return Windows(
        ids, np.arange(0, len(ids) + 1, LENGTH, dtype=np.int64), np.arange(DOCUMENTS, dtype=np.int32),
        np.ones(DOCUMENTS, np.int32), tuple(f"d{number}" for number in range(DOCUMENTS)), {"name": "test"},
    )  # fmt: skip


WINDOWS = windows_of()
FLOAT = -np.random.default_rng(1).uniform(1, 3, DOCUMENTS * LENGTH).astype(np.float32)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "model" / "model.safetensors", {"a": np.zeros(64, np.float32)})
    return tmp_path / "model"


@pytest.fixture
def served(tmp_path):
    """An output of serve_smoke with these log-probabilities."""

    def of(logprobs, windows=WINDOWS):
        folder = tmp_path / "served"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if logprobs is not None:
            write_safetensors(folder / "scores.safetensors", {"logprobs": logprobs})
            write_json(folder / "scores.json", {"windows_sha256": windows.sha256})
        return folder

    return of


@pytest.fixture
def run(tmp_path, model, served):
    """Evaluate with an engine that gives these log-probabilities."""

    def of(name, logprobs, server="same", baseline=None, top1=None):
        out = tmp_path / name
        out.mkdir()
        likeliest = np.zeros(len(FLOAT), np.int32) if top1 is None else top1

        def worker(toolchain, module, job, label):
            assert (toolchain, module, job["kind"]) == ("reference", "quantline.reference", "score")
            write_safetensors(Path(job["output"]), {"logprobs": logprobs, "top1": likeliest})
            return JobResult({"tokens_per_second": 7.0}, 1.0, 0)

        verdict = evaluate(
            checkpoint=model, windows=WINDOWS, served=served(logprobs if isinstance(server, str) else server),
            baseline=baseline, float_model=model, bootstrap=BOOTSTRAP, engine_tolerance=0.01, batch_tokens=64,
            device="cpu", threads=1, out=out, run_worker=worker,
        )  # fmt: skip
        return verdict, out

    return of


def test_the_float_model_is_compared_with_itself(run):
    verdict, out = run("float", FLOAT)
    assert verdict.verdict == "same"
    assert verdict.metrics["perplexity_ratio"] == 1
    assert verdict.metrics["nll_difference"] == 0
    assert verdict.metrics["top1_agreement"] == 1
    assert verdict.metrics["tokens_scored"] == DOCUMENTS * (LENGTH - 1)
    assert verdict.metrics["reference_tokens_per_second"] == 7
    scored = FLOAT.reshape(DOCUMENTS, LENGTH)[:, 1:].astype(np.float64)
    assert verdict.metrics["reference_perplexity"] == pytest.approx(np.exp(-scored.mean()))
    assert {path.name for path in out.iterdir()} >= {"documents.jsonl", "comparison.json", "reference.safetensors"}
    assert json.loads((out / "comparison.json").read_text())["level"] == 0.95


@pytest.mark.parametrize(("shift", "expected"), [(-0.1, "worse"), (0.1, "better")])
def test_a_variant_is_worse_or_better_than_the_float_model_by_document(run, shift, expected):
    _, baseline = run("float", FLOAT)
    verdict, _ = run("variant", FLOAT + np.float32(shift), baseline=baseline)
    assert verdict.verdict == expected
    assert verdict.metrics["nll_difference"] == pytest.approx(-shift, abs=1e-6)
    assert verdict.metrics["perplexity_ratio"] == pytest.approx(np.exp(-shift), rel=1e-5)


def test_likeliest_tokens_are_compared_with_the_float_models(run):
    _, baseline = run("float", FLOAT)
    other = np.zeros(len(FLOAT), np.int32)
    other[: len(other) // 2] = 1
    verdict, _ = run("variant", FLOAT, baseline=baseline, top1=other)
    assert verdict.metrics["top1_agreement"] == pytest.approx(0.5, abs=0.05)


def test_a_variant_that_was_not_served_has_no_numbers_of_the_server(run):
    verdict, out = run("refused", FLOAT, server=None)
    assert not [name for name in verdict.metrics if "vllm" in name or "engine" in name]
    assert read_documents(out / "documents.jsonl")[1] is None


def test_a_server_that_disagrees_with_the_reference_engine_is_a_failure(run):
    with pytest.raises(QuantlineError, match="engine_tolerance"):
        run("variant", FLOAT, server=FLOAT - np.float32(0.05))


def test_scores_of_other_windows_are_refused(served):
    folder = served(FLOAT, windows_of(seed=5))
    with pytest.raises(UserError, match="scored other windows than this evaluation's; run serve_smoke again"):
        load_server_scores(folder, WINDOWS)


def test_damaged_scores_are_refused(served):
    folder = served(FLOAT)
    (folder / "scores.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="scores cannot be read"):
        load_server_scores(folder, WINDOWS)


def test_a_baseline_of_other_text_is_refused(run, tmp_path):
    _, baseline = run("float", FLOAT)
    path = baseline / "documents.jsonl"
    path.write_text(path.read_text().replace('"d0"', '"other"'))
    with pytest.raises(UserError):
        run("variant", FLOAT, baseline=baseline)
