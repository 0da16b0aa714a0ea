"""The pipeline as a user runs it: `dvc repro`, then `publish`, with the real toolchains and the real server."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sqlite3
from pathlib import Path

import psutil
import pytest
import yaml
from checkout import PLANTED, SHARED, VARIANTS, wait_for
from hub_server import Hub, serving

from quantline.core.files import sha256_of
from quantline.pipeline.identity import combined, file_hashes
from quantline.pipeline.records import pipeline_records
from quantline.serving.rules import cpu_instructions
from quantline.toolchains.environments import HEALTH_CHECKS, detect_platform, lock_file

# The first of these tests builds the pipeline, and the environments where they are not there.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

EACH = ("calibrate", "quantize", "convert", "serve_smoke", "evaluate", "tasks", "speed")
NAMES = ["float", *VARIANTS]
ON_CPU = detect_platform() == "cpu"
# vLLM's kernels for 4 bits on a CPU are of AVX-512.
ON_CPU_SERVED = ["float", "awq-w4-g128", "gptq-w4-g128"] if cpu_instructions() == "avx512" else ["float"]
SERVED = ON_CPU_SERVED if ON_CPU else NAMES


def stages_of(name):
    return ("serve_smoke", "evaluate", "tasks") if name == "float" else EACH


@pytest.fixture
def params(pipeline):
    """params.yaml may be changed; afterwards it is as it was, and so is what was built from it."""
    path = pipeline.root / "params.yaml"
    before = path.read_bytes()
    yield path
    path.write_bytes(before)
    assert pipeline.dvc("repro").code == 0


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def ran(done):
    """The stages that a `dvc repro` ran, rather than skipped or took from the cache."""
    return re.findall(r"Running stage '([^']+)'", done.text)


def test_a_first_repro_runs_every_stage_of_every_variant(pipeline, first_run):
    once = [
        "code", "inputs", "compose_baseline", "download", "serve_smoke_baseline", "evaluate_baseline", "tasks_baseline",
        "fleet_smoke", "report",
    ]  # fmt: skip
    expected = {*once, *(f"{stage}@{name}" for stage in ("compose", *EACH) for name in VARIANTS)}
    assert set(ran(first_run)) == expected
    assert set(yaml.safe_load((pipeline.root / "dvc.lock").read_text())["stages"]) == expected


def test_a_variant_goes_to_the_hub_with_its_figures_and_neither_token_nor_address_of_storage_is_shown(pipeline):
    command = [
        "python",
        "-m",
        "stages.upload",
        "variant=gptq-w4-g128",
        "repo=me/tiny",
        "promote.max_perplexity_increase=1",
    ]
    token = PLANTED["HF_TOKEN"]
    with serving(Hub(token=token)) as hub:
        away = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
        done = pipeline.run(*command, *([] if "gptq-w4-g128" in SERVED else ["despite=served"]), **away)
    assert done.code == 0, done.text
    assert done.out.startswith(f"gptq-w4-g128 -> {hub.address}/me/tiny (private), commit ")
    assert done.out.count("\n") == 1
    assert token not in done.text
    assert "/lfs/" not in done.text
    held = hub.repos["models", "me/tiny"]
    assert held.keys() - {".gitattributes"} == {"README.md", *pipeline.result("gptq-w4-g128", "convert")["outputs"]}
    card = held["README.md"].decode()
    assert "| perplexity growth | +" in card
    assert ("vllm serve me/tiny --dtype float16" in card) == ("gptq-w4-g128" in SERVED)
    assert str(pipeline.root.parent) not in card


def test_a_second_repro_only_looks_at_the_files_that_variants_name(pipeline):
    before = pipeline.files()
    done = pipeline.dvc("repro")
    assert done.code == 0
    assert ran(done) == ["inputs"]
    assert pipeline.files() == before


def test_nothing_is_left_of_a_run(pipeline):
    assert pipeline.staying() == []
    assert pipeline.leftovers() == []


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_has_a_result_that_describes_its_output(pipeline, name):
    for stage in stages_of(name):
        result, folder = pipeline.result(name, stage), pipeline.root / "artifacts" / name / stage
        assert (result["stage"], result["variant"]) == (stage, name)
        assert result["outputs"] == file_hashes(folder)
        assert result["output_hash"] == combined(result["outputs"])
        assert result["inputs"] or stage == "tasks"  # none is asked here
        assert result["timings"]["total_seconds"] > 0
        assert result["peak_memory_bytes"] > 1e7
        refused = stage == "serve_smoke" and name not in SERVED
        assert result["status"] == ("unsupported" if refused else "ok")
        assert bool(result["reason"]) == refused


def test_results_name_the_environment_that_they_were_made_in(pipeline, root):
    platform = detect_platform()
    used = {"quantize": {"awq-w4-g128": "autoawq", "gptq-w4-g128": "auto_gptq", "gptq-w8-g128": "auto_gptq"}}
    for name in VARIANTS:
        for stage, toolchain in (
            ("quantize", used["quantize"][name]),
            ("evaluate", "reference"),
            ("serve_smoke", "vllm"),
        ):
            environment = pipeline.result(name, stage)["environment"]
            assert environment["toolchain"] == toolchain
            assert environment["lock_sha256"] == sha256_of(lock_file(root, toolchain, platform))
            assert environment["device"] == platform
            assert environment["versions"]
    assert set(HEALTH_CHECKS) > {"reference", "autoawq", "auto_gptq", "vllm"}


def test_a_stage_names_the_content_of_what_it_was_made_from(pipeline):
    for name in VARIANTS:
        results = {stage: pipeline.result(name, stage) for stage in EACH}
        assert results["convert"]["inputs"] == {"quantize": results["quantize"]["output_hash"]}
        tokens = results["calibrate"]["outputs"]["tokens.safetensors"]
        assert results["quantize"]["inputs"]["calibrate/tokens.safetensors"] == tokens
        inputs = results["evaluate"]["inputs"]
        assert inputs["calibrate/tokens.safetensors"] == tokens
        assert inputs["convert"] == results["convert"]["output_hash"]
        assert inputs["serve_smoke"] == results["serve_smoke"]["output_hash"]
        assert inputs["float/evaluate"] == pipeline.result("float", "evaluate")["output_hash"]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_linear_was_quantized_with_the_bits_that_were_asked_for(pipeline, name):
    result = pipeline.result(name, "quantize")
    assert result["metrics"]["linears_quantized"] == result["metrics"]["linears_expected"] == 35
    assert result["metrics"]["probe_max_difference"] < 0.05
    assert result["metrics"]["calibration_tokens"] == 4 * 256
    written = json.loads((pipeline.root / "artifacts" / name / "convert" / "config.json").read_text())
    assert written["quantization_config"]["bits"] == (8 if "w8" in name else 4)
    assert written["quantization_config"]["group_size"] == 128


def test_perplexities_are_finite_and_of_the_same_tokens(pipeline):
    measured = {name: pipeline.result(name, "evaluate")["metrics"] for name in NAMES}
    assert len({metrics["tokens_scored"] for metrics in measured.values()}) == 1
    for metrics in measured.values():
        assert 4000 < metrics["tokens_scored"] <= 6000
        assert all(math.isfinite(value) for value in metrics.values())
        assert 5 < metrics["reference_perplexity"] < 40
    assert measured["float"]["perplexity_ratio"] == 1
    for name in ("awq-w4-g128", "gptq-w4-g128"):
        assert 1 < measured[name]["perplexity_ratio"] < 1.2
        assert measured[name]["nll_difference_low"] < measured[name]["nll_difference_high"]
    assert abs(measured["gptq-w8-g128"]["perplexity_ratio"] - 1) < 0.005
    assert measured["gptq-w4-g128"]["size_bytes"] < measured["gptq-w8-g128"]["size_bytes"]


def test_every_instrument_looked_at_every_variant_and_only_the_float_model_is_without_loss(pipeline):
    metrics = {name: pipeline.result(name, "evaluate")["metrics"] for name in NAMES}
    assert (metrics["float"]["kl_divergence_high"], metrics["float"]["identical_generations"]) == (0.0, 1.0)
    for name in VARIANTS:
        own = metrics[name]
        assert 0 < own["kl_divergence_low"] <= own["kl_divergence"] <= own["kl_divergence_high"] < 0.1
        assert 0.75 < own["top1_agreement_low"] <= own["top1_agreement"] <= own["top1_agreement_high"] <= 1
        assert max(own["output_error_change"], own["weight_error_change"]) < 0.001
        assert own["changed_files"] == 0
        assert -0.5 < own["restored_share_max"] < 1
        flags = pipeline.result(name, "evaluate")["tables"]["flags"]
        assert own["alarms"] == len(flags)
        # The other instruments need more text and prompts than this pipeline has.
        lost = {"perplexity_increase", "kl_divergence", "top1_agreement", "output_error_change", "weight_error_change"}
        assert not lost & {flag["instrument"] for flag in flags}
        files = {Path(file).name for file in pipeline.result(name, "evaluate")["files"]}
        assert files >= {"comparison.json", "documents.jsonl", "layer_errors.csv", "restored.csv"}
    assert metrics["gptq-w8-g128"]["kl_divergence"] < metrics["gptq-w4-g128"]["kl_divergence"] / 10


@pytest.mark.parametrize("name", SERVED)
def test_the_server_and_the_reference_engine_agree(pipeline, name):
    metrics = pipeline.result(name, "evaluate")["metrics"]
    assert abs(metrics["vllm_perplexity"] / metrics["reference_perplexity"] - 1) < 0.01
    answers = json.loads((pipeline.root / "artifacts" / name / "serve_smoke" / "answers.json").read_text())
    assert len(answers) == 6
    assert all(answer["text"].strip() for answer in answers)


@pytest.mark.skipif(not ON_CPU, reason="a GPU serves it")
def test_a_variant_that_the_server_cannot_take_is_evaluated_all_the_same(pipeline):
    metrics = pipeline.result("gptq-w8-g128", "evaluate")["metrics"]
    assert "reference_perplexity" in metrics
    assert "vllm_perplexity" not in metrics


def test_a_stage_by_hand_finds_its_inputs_and_makes_the_same_in_scratch(pipeline):
    before = {name: known for name, known in pipeline.files().items() if not name.startswith("scratch/")}
    done = pipeline.stage("quantize", "method=gptq", "bits=8", "variant=by-hand")
    assert done.code == 0, done.text
    assert "-> scratch/by-hand/quantize" in done.err
    ours, theirs = pipeline.result("by-hand", "quantize", "scratch"), pipeline.result("gptq-w8-g128", "quantize")
    assert ours["fingerprint"] == theirs["fingerprint"]
    assert ours["inputs"] == theirs["inputs"]
    assert ours["output_hash"] == theirs["output_hash"]
    after = {name: known for name, known in pipeline.files().items() if not name.startswith("scratch/")}
    assert after == before


def runs_of(pipeline):
    """name -> (name of the parent or None, status) of every run in MLflow's store, and the store's whole text."""
    with sqlite3.connect(pipeline.root / "mlflow.db") as store:
        names = dict(store.execute("select run_uuid, name from runs"))
        status = dict(store.execute("select run_uuid, status from runs"))
        parents = dict(store.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        text = "\n".join(store.iterdump())
    assert len(set(names.values())) == len(names)
    return {name: (names.get(parents.get(run)), status[run]) for run, name in names.items()}, text


def test_publish_prints_the_table_and_makes_a_run_per_variant_and_stage_once(pipeline):
    done = pipeline.run("python", "-m", "stages.publish")
    assert done.code == 0, done.text
    lines = done.out.splitlines()
    for name in NAMES:
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert f"{pipeline.result(name, 'evaluate')['metrics']['reference_perplexity']:.2f}" in line
    runs, text = runs_of(pipeline)
    expected = dict.fromkeys(NAMES, (None, "FINISHED"))
    for name in NAMES:
        for stage in ("download", *stages_of(name)):
            expected[f"{name}: {stage}"] = (name, "FINISHED")
    expected["report"] = (None, "FINISHED")
    assert runs == expected
    again = pipeline.run("python", "-m", "stages.publish")
    assert again.code == 0
    assert again.out == done.out
    assert runs_of(pipeline) == (runs, text)


def test_results_stay_in_the_table_where_an_option_changed_but_nothing_that_follows_from_it(pipeline, params):
    """The layout is the same by another option: DVC runs `convert` again, and nothing after it."""
    replace(params, "gptq-w4-g128: method=gptq bits=4", "gptq-w4-g128: method=gptq convert.target=gptq bits=4")
    done = pipeline.dvc("repro")
    assert ran(done) == ["compose@gptq-w4-g128", "inputs", "convert@gptq-w4-g128", "fleet_smoke", "report"]
    (record,) = [record for record in pipeline_records(pipeline.root) if record.name == "gptq-w4-g128"]
    assert [result["stage"] for result in record.results] == ["download", *EACH]


def test_results_that_have_yet_to_follow_a_change_are_not_in_the_table(pipeline, params):
    replace(params, "gptq-w8-g128: method=gptq bits=8", "gptq-w8-g128: method=gptq bits=8 calibration.seed=5")
    assert pipeline.dvc("repro", "calibrate@gptq-w8-g128").code == 0
    (record,) = [record for record in pipeline_records(pipeline.root) if record.name == "gptq-w8-g128"]
    # tasks=none asks nothing, and so follows from nothing.
    assert [result["stage"] for result in record.results if result["stage"] != "tasks"] == ["download", "calibrate"]


def test_another_line_of_a_variant_runs_its_stages_alone_and_going_back_runs_nothing(pipeline, params):
    """Ctrl-C comes once in between: what was done until then is kept, and the rest follows."""
    name = "gptq-w8-g128"
    before = params.read_bytes()
    outputs = {stage: pipeline.result(name, stage)["output_hash"] for stage in EACH}
    replace(params, "bits=8 group_size=128", "bits=8 group_size=64")
    process = pipeline.start("python", "-m", "dvc", "repro")
    wait_for(lambda: quantizing(process.pid), process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "interrupted; nothing half written was left" in err, out + err
    assert pipeline.staying() == []
    assert pipeline.leftovers() == []
    assert not (pipeline.root / "artifacts" / name / "quantize").exists()

    done = pipeline.dvc("repro")
    assert done.code == 0, done.text
    assert sorted(ran(done)) == sorted([*(f"{stage}@{name}" for stage in EACH[1:]), "inputs", "fleet_smoke", "report"])
    assert pipeline.result(name, "quantize")["output_hash"] != outputs["quantize"]

    params.write_bytes(before)
    assert "compose@gptq-w8-g128" in pipeline.dvc("status").out
    back = pipeline.dvc("repro")
    assert back.code == 0, back.text
    assert ran(back) == ["inputs"]
    assert {stage: pipeline.result(name, stage)["output_hash"] for stage in EACH} == outputs
    assert pipeline.dvc("status").out.split("\n")[:2] == ["inputs:", "\talways changed"]


def quantizing(pid: int) -> bool:
    try:
        below = psutil.Process(pid).children(recursive=True)
        return any("quantline.toolchains.workers.quantizers.auto_gptq" in process.cmdline() for process in below)
    except psutil.NoSuchProcess:
        return False


def test_dvcs_tables_fit_a_terminal_and_lead_with_the_variant_to_ship(pipeline):
    shown = [pipeline.run("python", "-m", "dvc", *words, COLUMNS="120") for words in (
        ("metrics", "show"), ("metrics", "diff", "HEAD~1"),
        ("exp", "show", "--no-pager", "--drop", ".*", "--keep", "Exp|best|metrics"), ("params", "diff", "HEAD~1"),
    )]  # fmt: skip
    for table in shown:
        assert table.code == 0, table.text
        assert max(len(line) for line in table.out.splitlines()) <= 120
    manifest = json.loads((pipeline.root / "report" / "data" / "manifest.json").read_text())
    best = json.loads((pipeline.root / "metrics.json").read_text())["best"]
    assert best == (manifest["chosen"] or "none")
    assert best in shown[0].out.splitlines()[1]
    assert best in shown[2].out
    leads = pipeline.dvc("exp", "show").out.splitlines()
    assert leads[1][:120].split()[2] == "best"
    assert best in leads[3][:120]
    figures = json.loads((pipeline.root / "metrics" / "awq-w4-g128").read_text())
    measured = pipeline.result("awq-w4-g128", "evaluate")["metrics"]
    assert figures["perplexity"] == pytest.approx(measured["reference_perplexity"], rel=1e-3)
    assert figures["size_mb"] == pytest.approx(measured["size_bytes"] / 1e6, rel=1e-3)


def test_params_diff_names_the_line_and_the_stages_that_read_it_and_on_demand_the_option(pipeline, params):
    replace(params, "gptq-w8-g128: method=gptq bits=8", "gptq-w8-g128: method=gptq bits=8 seed=7")
    assert pipeline.dvc("repro", "inputs").code == 0
    rows = [line.split()[:2] for line in pipeline.dvc("params", "diff").out.splitlines()[1:]]
    assert sorted(rows) == [["inputs.yaml", "reads.gptq-w8-g128.quantize"], ["params.yaml", "variants.gptq-w8-g128"]]
    named = pipeline.dvc("params", "diff", "--targets", "variants/gptq-w8-g128.yaml").out
    assert re.search(r"^variants/gptq-w8-g128.yaml +seed +0 +7$", named, re.MULTILINE), named


def test_an_experiment_adds_a_variant_as_params_yaml_says(pipeline, params, root):
    """The command of the comment in params.yaml, for one stage."""
    (option,) = re.findall(r"dvc exp run -S '(.+)'", (root / "params.yaml").read_text())
    assert option == '+variants.gptq-w3="method=gptq bits=3"'
    done = pipeline.dvc("exp", "run", "-S", option, "calibrate@gptq-w3")
    assert done.code == 0, done.text
    assert {"compose@gptq-w3", "calibrate@gptq-w3"} <= set(ran(done))
    frozen = yaml.safe_load((pipeline.root / "variants" / "gptq-w3.yaml").read_text())
    assert (frozen["method"]["name"], frozen["bits"]) == ("gptq", 3)
    assert frozen["frozen"]["overrides"] == " ".join([*SHARED, "method=gptq", "bits=3"])
