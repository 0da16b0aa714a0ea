"""llama.cpp as a worker: the same files as its own program writes, the model's own tokens, and refusals before compute."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import llama_quantize
import numpy as np
import pytest
import yaml
from tiny_model import write_tokenizer

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers
from quantline.checkpoints.float_view import FloatView
from quantline.checkpoints.layouts.gguf.names import FAMILIES, MODEL_TYPES
from quantline.checkpoints.linears import select_linears
from quantline.checkpoints.model_config import read_config
from quantline.quantization.quantize import check_output, with_own_types
from quantline.toolchains import environments
from quantline.toolchains.toolchain import worker_environment
from quantline.toolchains.workers.llamacpp.library import log_probabilities
from quantline.toolchains.workers.quantizers import llamacpp

pytestmark = pytest.mark.toolchain("llamacpp")

KEPT = json.loads(llama_quantize.KEPT.read_text(encoding="utf-8"))
WHOLE = [case for case in KEPT if "sha256" in KEPT[case] or "tensors_sha256" in KEPT[case]]
READ = (*MODEL_TYPES, "qwen3_moe")  # of which weights are read back, tokenizers aside


PROBE = """
import sys
from pathlib import Path
from safetensors.numpy import load_file
from quantline.toolchains.protocol import Reporter
from quantline.toolchains.workers.reference import engine
folder = Path(sys.argv[1])
ids, out = load_file(folder / "probe.safetensors")["input_ids"].tolist(), folder / "probe.safetensors"
engine.run({"checkpoint": str(folder / "model"), "input_ids": ids, "output": str(out)}, Reporter())
"""


@pytest.fixture(scope="module")
def families(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    command = [environments.ensure(root, "reference").python, root / "tests/support/make_families.py", folder, *READ]
    done = subprocess.run(command, env=worker_environment(1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for family in READ:
        write_tokenizer(
            folder / family / "model", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"
        )
    # A Llama with another activation: transformers computes it, llama.cpp passes over that key of config.json.
    shutil.copytree(folder / "llama", folder / "gelu")
    config = read_config(folder / "gelu" / "model")
    (folder / "gelu" / "model" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    subprocess.run(
        [environments.ensure(root, "reference").python, "-c", PROBE, folder / "gelu"],
        env=worker_environment(1),
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def facts(work, families, tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("files"), {}
    for name in llama_quantize.WHOLE:
        (folder / f"{name}.gguf").write_bytes(llama_quantize.model(name))
        np.savez(folder / f"{name}.npz", **llama_quantize.importance(folder / f"{name}.gguf"))
    for case in WHOLE:
        name, mixture, *weighed = case.split()
        files[case] = [str(folder / f"{name}.gguf"), mixture, str(folder / f"{name}.npz") if weighed else None]
    models = {family: str(families / family / "model") for family in READ}
    return work("llamacpp", "llamacpp_facts", {"families": models, "files": files})


def job_of(families, folder, family, kind, **values):
    """A quantize job, with the linears that the stage would name."""
    model = values.pop("model", families / family / "model")
    options = {"type": kind, "imatrix": values.pop("imatrix", True)}
    checkpoint, config = Checkpoint.open(model), read_config(model)
    widths = select_linears(checkpoint, config, bits=4, group_size=32)
    widths, _ = with_own_types("gguf", options, checkpoint, config, widths)
    return {
        "model": str(model), "output": str(folder / "out"), "work": str(folder / "work"),
        "calibration": str(families / family / "tokens.safetensors") if options["imatrix"] else None,
        "probe": str(families / family / "probe.safetensors"), "probe_tolerance": 1e-3, "bits": 4, "group_size": 32,
        "seed": 0, "threads": 1, "device": "cpu", "options": options,
        "linears": {name: asdict(width) for name, width in widths.items()}, **values,
    }  # fmt: skip


@pytest.fixture(scope="module")
def jobs(families, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    strange = shutil.copytree(families / "llama" / "model", folder / "strange")
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    # Words are cut before every letter e, which no rules of llama.cpp do.
    cut = {"type": "Split", "pattern": {"String": "e"}, "behavior": "MergedWithNext", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, tokenizer["pre_tokenizer"]]}
    tokenizer["model"]["merges"].append(["e", "\u0120"])
    tokenizer["model"]["vocab"]["e\u0120"] = max(tokenizer["model"]["vocab"].values()) + 1
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = {
        "Q8_0": ("llama", "Q8_0"), "Q4_K_M": ("llama", "Q4_K_M"), "IQ2_M": ("qwen2", "IQ2_M"), "again": ("llama", "Q4_K_M"),
    }  # fmt: skip
    found = {label: job_of(families, folder / label, *one) for label, one in given.items()}
    found["plain"] = job_of(families, folder / "plain", "llama", "Q4_K_M", imatrix=False)
    found["threads"] = job_of(families, folder / "threads", "llama", "Q4_K_M", threads=2)
    found["strange"] = job_of(families, folder / "strange-out", "llama", "Q8_0", model=strange)
    found["misread"] = job_of(families, folder / "misread", "gelu", "Q8_0", imatrix=False)
    return found


@pytest.fixture(scope="module")
def results(work, jobs):
    return work("llamacpp", "batch", {"backend": "llamacpp", "jobs": jobs})


def file_of(jobs, label) -> bytes:
    return Path(jobs[label]["output"], "model.gguf").read_bytes()


@pytest.mark.parametrize("case", WHOLE)
def test_the_file_is_that_of_llama_quantize_byte_for_byte(facts, case):
    found = facts["hashes"][case]
    assert KEPT[case].get("sha256", found["sha256"]) == found["sha256"]
    assert KEPT[case].get("tensors_sha256", found["tensors_sha256"]) == found["tensors_sha256"]


@pytest.mark.parametrize("family", READ)
def test_every_parameter_of_a_family_is_read_back_as_it_was(facts, family):
    found = facts["differences"][family]
    # Of Gemma, 1 is added to norms and taken off again, in float32.
    assert found["largest"] <= (1e-6 if family.startswith("gemma") else 0)
    assert found["others"] in ([], ["lm_head.weight"])  # a second name of the embeddings
    assert found["names"] >= 15


def test_the_families_that_are_read_are_those_of_the_table():
    assert {MODEL_TYPES.get(family, "qwen3moe") for family in READ} == set(FAMILIES)


@pytest.mark.parametrize("label", ["Q8_0", "Q4_K_M", "IQ2_M", "plain"])
def test_a_model_is_quantized_in_the_types_that_were_planned(jobs, results, label):
    job, result = jobs[label], results[label]
    out = Path(job["output"])
    assert result["metrics"]["probe_max_difference"] < 1e-3
    found = {row["module"]: row["type"].lower() for row in result["layers"]}
    assert found == {name: width["kind"] for name, width in job["linears"].items()}
    info = quantization_of(out)
    assert set(quantized_layers(Checkpoint.open(out), info)) >= set(job["linears"])
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.gguf"} <= {
        one.name for one in out.iterdir()
    }
    assert not Path(job["work"], "float.gguf").exists()


def test_eight_bits_are_half_a_step_from_the_float_model(jobs, results):
    before, after = FloatView.open(jobs["Q8_0"]["model"]), FloatView.open(jobs["Q8_0"]["output"])
    assert results["Q8_0"]["metrics"]["probe_quantized_rms"] < results["Q4_K_M"]["metrics"]["probe_quantized_rms"]
    for name in jobs["Q8_0"]["linears"]:
        weight = before.values(f"{name}.weight")
        step = np.abs(weight.reshape(len(weight), -1, 32)).max(axis=2).repeat(32, axis=1) / 127
        assert (np.abs(after.values(f"{name}.weight") - weight) <= 0.57 * step).all()  # the scale is float16


def test_the_importance_matrix_makes_another_file_and_the_same_job_the_same(jobs, results):
    assert file_of(jobs, "Q4_K_M") == file_of(jobs, "again") == file_of(jobs, "threads")
    assert file_of(jobs, "Q4_K_M") != file_of(jobs, "plain")
    assert results["plain"]["metrics"]["calibration_tokens"] == 0


def test_what_was_written_passes_the_stage_and_has_the_embeddings_quantized_too(jobs, results):
    from quantline.checkpoints.layouts.linear_spec import LinearSpec
    from quantline.quantization.file_checks import inspect

    job = jobs["Q4_K_M"]
    widths = {name: LinearSpec(**width) for name, width in job["linears"].items()}
    check_output(Path(job["output"]), widths)
    found = inspect(Path(job["model"]), Path(job["output"]), list(widths))
    assert found.faults == []
    assert "model.embed_tokens" not in found.linears
    info = quantization_of(job["output"])
    assert (info.of("model.embed_tokens").bits, info.of("lm_head").bits) == (5, 8)
    assert results["Q4_K_M"]["metrics"]["imatrix_seconds"] >= 0


def test_a_vocabulary_that_the_converter_does_not_know_gets_the_rules_that_give_its_tokens(results):
    assert any(
        "does not know this vocabulary; the rules of" in warning and "give the same tokens" in warning
        for warning in results["Q8_0"]["warnings"]
    )


def test_rows_of_128_are_told_with_the_types_that_they_got(results):
    told = [warning for warning in results["Q4_K_M"]["warnings"] if "no multiple of 256" in warning]
    assert told
    assert "so Q4_K_M is here" in told[0]
    assert "Q5_0" in told[0]


def test_a_tokenizer_that_llama_cpp_has_no_rules_for_is_refused(jobs, results):
    assert "llama.cpp has no tokenizer with this vocabulary's tokens" in results["strange"]["refused"]
    assert results["strange"]["left"] == []


def test_a_model_whose_logits_are_others_is_refused(results):
    assert "llama.cpp misreads the model: in float, its logits differ" in results["misread"]["refused"]
    assert results["misread"]["left"] == []


def test_log_probabilities_are_those_of_the_softmax_in_float64():
    logits = np.array([[1.0, 2.0, 3.0], [0.0, 700.0, -700.0]], dtype=np.float32)
    found = log_probabilities(logits, [2, 1])
    assert found[0] == pytest.approx(3 - np.log(np.exp([1.0, 2.0, 3.0]).sum()))
    assert found[1] == 0


def test_the_options_are_those_of_the_configuration(root):
    assert set(llamacpp.DEFAULTS) | {"name"} == set(yaml.safe_load((root / "conf/method/gguf.yaml").read_text()))
