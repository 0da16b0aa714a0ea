from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sections
from safetensors.numpy import load_file

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.config.evaluate import RestoreConfig
from quantline.core.errors import QuantlineError, UserError
from quantline.core.files import write_json
from quantline.data.windows import Windows
from quantline.evaluation.evaluate import Inputs, evaluate
from quantline.evaluation.generations import choose_prompts
from quantline.evaluation.measurements import LayerInputs, MeasurementOptions
from quantline.evaluation.perplexity import load_server_scores, read_documents
from quantline.toolchains.protocol import JobResult

DOCUMENTS, LENGTH = 12, 9
LINEARS = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
GENERATIONS = sections.generations(prompts=4, prompt_tokens=3, new_tokens=2, tie_margin=0.01)
BARE = MeasurementOptions()
OPTIONS = sections.evaluation()


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

    def of(logprobs, windows=WINDOWS, continued=None):
        folder = tmp_path / "served"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if logprobs is not None:
            write_safetensors(folder / "scores.safetensors", {"logprobs": logprobs})
            write_json(folder / "scores.json", {"windows_sha256": windows.sha256})
        if continued is not None:
            write_json(folder / "generations.json", continued)
        return folder

    return of


@pytest.fixture
def run(tmp_path, model, served):
    """Evaluate with an engine that gives these log-probabilities."""

    jobs = []

    def of(
        name, logprobs, *, server="same", baseline=None, top1=None, kl=None, said=1, errors=0.1, instruments=BARE,
        windows=WINDOWS, continued=None,
    ):  # fmt: skip
        out = tmp_path / name
        out.mkdir()
        likeliest = np.zeros(len(FLOAT), np.int32) if top1 is None else top1

        def worker(toolchain, module, job, label):
            assert (toolchain, module) == ("reference", "quantline.toolchains.workers.reference.evaluate")
            jobs.append(job)
            tensors = {"logprobs": logprobs, "top1": likeliest}
            if "baseline" in job:
                tensors["kl"] = np.full(len(FLOAT), 0.5, np.float32) if kl is None else kl
            data = {"tokens_per_second": 7.0}
            if "generate" in job:
                count = len(job["generate"]["prompts"])
                data["generations"] = {"tokens": [[said, 1]] * count, "margins": [[0.5, 0.5]] * count}
            if "restore" in job:
                part = load_file(job["restore"]["windows"])["input_ids"]
                back = -np.full((2, len(part)), 2.0, np.float32)
                back[0] -= 1
                divergence = np.stack([np.full(len(part), value, np.float32) for value in (0.5, 0.2)])
                write_safetensors(Path(job["restore"]["output"]), {"logprobs": back, "kl": divergence})
            if "layers" in job:
                data["errors"] = [{"name": name, "output_error": errors, "weight_error": 0.1} for name in LINEARS]
                data["restored"] = [
                    {"name": LINEARS[0], "tensor": 1, "note": ""}, {"name": LINEARS[1], "tensor": None, "note": "fused"}
                ]  # fmt: skip
            write_safetensors(Path(job["output"]), tensors)
            return JobResult(data, 1.0, 0)

        verdict = evaluate(
            Inputs(model, model, served(logprobs if isinstance(server, str) else server, continued=continued), baseline),
            windows, OPTIONS, device="cpu", threads=1, out=out, run_worker=worker, instruments=instruments,
        )  # fmt: skip
        return verdict, out

    of.jobs = jobs
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


def test_the_worst_group_stands_beside_the_mean_and_changes_no_other_figure(run):
    half = DOCUMENTS // 2
    ids = tuple(f"{'law' if number < half else 'code'}/{number}" for number in range(DOCUMENTS))
    own = FLOAT - np.repeat(np.where(np.arange(DOCUMENTS) < half, 0.4, 0.1), LENGTH).astype(np.float32)
    found = {}
    for name, windows in (("plain", WINDOWS), ("grouped", replace(WINDOWS, document_ids=ids))):
        _, baseline = run(f"float-{name}", FLOAT, windows=windows)
        found[name], out = run(name, own, baseline=baseline, windows=windows)
    more = found["grouped"].metrics.keys() - found["plain"].metrics.keys()
    assert more == {"worst_group_difference", "worst_group_low", "worst_group_high"}
    assert {key: found["grouped"].metrics[key] for key in found["plain"].metrics} == found["plain"].metrics
    assert found["grouped"].metrics["worst_group_difference"] == pytest.approx(0.4, abs=1e-6)
    assert [row["group"] for row in found["grouped"].tables["groups"]] == ["law", "code"]
    assert "groups.csv" in found["grouped"].files
    assert (out / "groups.csv").read_text().splitlines()[1].startswith("law,")
    assert any(note.startswith("the group law loses more than the whole text") for note in found["grouped"].notes)


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


@pytest.fixture
def layers(tmp_path):
    """What quantize measured, as the evaluation takes it."""
    folder = tmp_path / "quantized" / "coverage"
    folder.mkdir(parents=True)
    rows = [f"{name},{number},mlp.up_proj,0.1,0.1,0.3,0.05,moderate" for number, name in enumerate(LINEARS)]
    columns = "name,layer,module,output_error,weight_error,weight_error_max,weight_error_mean,level"
    (folder / "layers.csv").write_text("\n".join([columns, *rows]) + "\n")
    return LayerInputs(folder.parent, tmp_path / "tokens.safetensors", 2, None, RestoreConfig(layers=2, tokens=40))


def test_the_float_model_from_itself_diverges_by_nothing_and_needs_no_second_model(run):
    verdict, out = run("float", FLOAT, instruments=MeasurementOptions(divergence=None, generations=GENERATIONS))
    assert "baseline" not in run.jobs[0]
    names = ("kl_divergence", "kl_divergence_low", "kl_divergence_high", "nll_difference_low", "nll_difference_high")
    assert [verdict.metrics[name] for name in names] == [0.0] * 5
    assert (verdict.verdict, verdict.metrics["identical_generations"]) == ("same", 1.0)
    assert verdict.metrics["top1_agreement_low"] == verdict.metrics["top1_agreement_high"] == 1.0
    assert json.loads((out / "comparison.json").read_text())["kl"]["estimate"] == 0.0


def test_the_divergence_is_a_mean_over_tokens_with_an_interval_over_documents(run):
    _, baseline = run("float", FLOAT)
    kl = np.repeat(np.linspace(0, 1.1, DOCUMENTS, dtype=np.float32), LENGTH)
    verdict, out = run("variant", FLOAT, baseline=baseline, kl=kl, instruments=MeasurementOptions(divergence=None))
    assert verdict.metrics["kl_divergence"] == pytest.approx(0.55)
    assert 0.3 < verdict.metrics["kl_divergence_low"] < 0.55 < verdict.metrics["kl_divergence_high"] < 0.8
    section = json.loads((out / "comparison.json").read_text())["kl"]
    assert (section["unit"], section["median"]) == ("nats/token", pytest.approx(0.55))


def test_continuations_are_held_against_those_that_the_float_model_kept(run):
    tools = MeasurementOptions(generations=GENERATIONS)
    _, baseline = run("float", FLOAT, instruments=tools)
    verdict, out = run("variant", FLOAT, baseline=baseline, said=2, instruments=tools)
    assert (verdict.metrics["identical_generations"], verdict.metrics["first_divergence_median"]) == (0.0, 0.0)
    section = json.loads((out / "comparison.json").read_text())["generations"]
    assert (section["prompts"], section["new_tokens"], len(section["rows"])) == (4, 2, 4)
    (baseline / "generations.json").unlink()
    with pytest.raises(UserError, match="evaluate the float model again"):
        run("again", FLOAT, baseline=baseline, instruments=tools)


def test_continuations_of_the_server_are_taken_where_it_made_them_of_these_prompts(run):
    tools = MeasurementOptions(generations=GENERATIONS)
    prompts = [list(tokens) for tokens in choose_prompts(WINDOWS, 4, 3).tokens]
    continued = {"prompts": prompts, "tokens": [[3, 1]] * 4, "margins": [[0.5, 0.5]] * 4, "engine": "vllm"}
    _, baseline = run("float", FLOAT, instruments=tools, continued=continued)
    verdict, out = run("variant", FLOAT, baseline=baseline, instruments=tools, continued=continued)
    assert not any("generate" in job for job in run.jobs)
    assert json.loads((baseline / "generations.json").read_text())["tokens"] == continued["tokens"]
    section = json.loads((out / "comparison.json").read_text())["generations"]
    assert (section["engine"], section["float_engine"], section["identical"]) == ("vllm", "vllm", 1.0)
    assert not any("continuations are of" in note for note in verdict.notes)
    # Of other prompts, or of another length, they are not taken.
    for name, other in (("prompts", [[9, 9, 9]] * 4), ("tokens", [[3, 1, 1]] * 4)):
        verdict, _ = run(name, FLOAT, baseline=baseline, instruments=tools, continued={**continued, name: other})
        assert "generate" in run.jobs[-1]
        assert "continuations are of reference, and the float model's of vllm" in verdict.notes[0]


def test_the_worst_linears_shares_are_told_and_what_cannot_be_put_back_says_why(run, layers):
    _, baseline = run("float", FLOAT)
    verdict, out = run(
        "variant", FLOAT, baseline=baseline, instruments=MeasurementOptions(divergence=None, layers=layers)
    )
    first, second = verdict.tables["restored"]
    assert (first["recovered_kl_share"], second["note"]) == (pytest.approx(0.6), "fused")
    assert second["recovered_nll"] is None
    assert len(run.jobs[-1]["layers"]["linears"]) == 2
    chosen = FLOAT.reshape(DOCUMENTS, LENGTH)[[0, 4, 7, 11], 1:].astype(np.float64)  # 40 of 108 tokens
    assert first["nll_difference_restored"] == pytest.approx(2.0 + chosen.mean())
    assert (first["recovered_nll"], first["recovered_low"]) == (pytest.approx(1.0), pytest.approx(1.0))
    header = (out / "restored.csv").read_text().splitlines()[0]
    assert header.startswith("name,layer,module,output_error,nll_difference_restored,recovered_nll")
    assert [row["key"] for row in verdict.tables["layer_errors"]] == [0, 1, "mlp.up_proj"]
    assert verdict.metrics["output_error_change"] == 0.0
    assert verdict.notes[0].startswith(
        "linears with the largest output errors: model.layers.0.mlp.up_proj (60 % of the divergence)"
    )


def test_a_variant_without_measured_linears_says_so(run, layers, tmp_path):
    _, baseline = run("float", FLOAT)
    bare = replace(layers, quantized=tmp_path / "elsewhere")
    verdict, _ = run("variant", FLOAT, baseline=baseline, instruments=MeasurementOptions(divergence=None, layers=bare))
    assert "layers" not in run.jobs[-1]
    assert "errors of single linears are not measured" in verdict.notes[0]
    assert verdict.notes[1].startswith(f"the intervals rest on {DOCUMENTS} documents only")


def test_alarms_are_told_and_fail_only_where_they_should(run, layers):
    _, baseline = run("float", FLOAT)
    tools = MeasurementOptions(
        divergence=None, layers=layers, limits=sections.limits(kl_divergence=0.1, output_error_change=0.02)
    )
    verdict, out = run("warned", FLOAT, baseline=baseline, errors=0.2, instruments=tools)
    assert [row["instrument"] for row in verdict.tables["flags"]] == ["kl_divergence", "output_error_change"]
    assert verdict.metrics["alarms"] == 2
    spoilt = MeasurementOptions(
        divergence=None, layers=layers, limits=sections.limits(changed_files=0), changed_files=1
    )
    told, _ = run("spoilt", FLOAT, baseline=baseline, instruments=spoilt)
    assert [row["message"] for row in told.tables["flags"]] == [
        "the conversion record does not hold for 1 file of the checkpoint; at most 0 files (evaluate.limits.changed_files=0)"
    ]
    assert json.loads((out / "comparison.json").read_text())["flags"] == verdict.tables["flags"]
    with pytest.raises(QuantlineError, match=r"evaluate\.fail_on=kl_divergence: .* 0\.500 nats a token .*at most 0\.1"):
        run("failed", FLOAT, baseline=baseline, instruments=replace(tools, fail_on=("kl_divergence",)))


def test_the_noise_floor_stands_beside_the_loss(run):
    noise = {"runs": 3, "low": 0.01, "high": 0.03, "seeds": [0, 1, 2]}
    verdict, out = run("variant", FLOAT, instruments=MeasurementOptions(noise=noise))
    assert (verdict.metrics["noise_low"], verdict.metrics["noise_high"], verdict.metrics["noise_runs"]) == (
        0.01,
        0.03,
        3,
    )
    assert json.loads((out / "comparison.json").read_text())["noise"] == noise


def test_a_protocol_by_words_compares_losses_per_word(run):
    words = np.full(DOCUMENTS, 4)
    windows = replace(WINDOWS, words=words, text_bytes=words * 6, protocol={"name": "test", "level": "word"})
    _, baseline = run("float", FLOAT, windows=windows)
    verdict, out = run("variant", FLOAT - np.float32(0.1), baseline=baseline, windows=windows)
    assert verdict.metrics["nll_difference"] == pytest.approx(0.1 * (LENGTH - 1) / 4, rel=1e-4)
    assert verdict.metrics["reference_nll"] == pytest.approx(-(FLOAT.reshape(DOCUMENTS, LENGTH)[:, 1:].mean()) + 0.1)
    protocol = json.loads((out / "comparison.json").read_text())["protocol"]
    assert (protocol["level"], protocol["words_scored"], protocol["tokens_scored"]) == ("word", 48, 96)
