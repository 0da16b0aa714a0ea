"""What a user gets wrong, and what the machine does: a message with the value, what is allowed and a remedy."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess

import pytest
from checkout import Done

from quantline.toolchains.environments import detect_platform

# Whichever of these tests comes first builds the pipeline, and the environments where they are not there.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

EMPTY = '{"text": ""}\n{"text": "  "}\n'


def assert_refused(done: Done, *words: str, code: int = 2) -> None:
    assert done.code == code, done.text
    assert "Traceback" not in done.text
    assert done.err.count("error: ") == 1, done.err
    for word in words:
        assert word in done.err, done.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=gptq", "bits=5"], ["bits=5: gptq takes 2, 3, 4 or 8"]),
        (["method=awq", "bits=8"], ["bits=8: awq takes 4; method=gptq takes bits=8"]),
        (["group_size=96"], ["group_size=96: awq takes 32, 64, 128 or 256; the nearest is 64"]),
        (["method=gptqq"], ["method=gptqq: allowed are autoround, awq, bnb, float, ", "rtn (did you mean gptq?)"]),
        (["bitss=4"], ["bitss: no such option (did you mean bits?)", "--help"]),
        (["method.symm=true"], ["method.symm: no such option (did you mean method.sym?)", "--help"]),
        (["+method.extra=1"], ["method.extra: no such option", "--help"]),
        (["method=gptq", "bits=5", "group_size=7", "threads=0"], ["3 faults", "bits=5", "group_size=7", "threads=0"]),
        (["bits=[4"], ["bits=[4: is not a valid override; give KEY=VALUE"]),
        (["variant=../outside"], ["variant='../outside'", "takes letters, digits"]),
        (["method=float"], ["method=float: the baseline skips quantize; choose method=awq, gptq, rtn, bnb"]),
    ],
)
def test_an_option_that_cannot_work_is_refused_before_anything_runs(bare, untouched, overrides, words):
    assert_refused(bare.stage("quantize", *overrides), *words)


def test_a_frozen_configuration_takes_no_overrides(pipeline, untouched):
    done = pipeline.run("python", "-m", "stages.quantize", "-cp", "../variants", "-cn", "gptq-w4-g128", "bits=8")
    assert_refused(done, "bits=8: variants/gptq-w4-g128.yaml is frozen", "params.yaml")


def test_a_folder_of_configurations_that_is_not_there_names_the_command_that_makes_it(bare, untouched):
    done = bare.run("python", "-m", "stages.quantize", "-cp", "../none", "-cn", "nope")
    assert_refused(done, "none: no such folder of configurations", "dvc repro")


def test_a_frozen_configuration_that_is_not_there_names_those_that_are(pipeline, untouched):
    done = pipeline.run("python", "-m", "stages.quantize", "-cp", "../variants", "-cn", "nope")
    assert_refused(done, "nope: no such configuration", "params.yaml names float, awq-w4-g128")


def test_dvc_runs_no_stage_from_a_configuration_that_is_not_frozen(bare, untouched):
    assert_refused(bare.stage("quantize", DVC_STAGE="quantize@x"), "not frozen", "-cp ../variants -cn NAME")


def test_a_variant_that_is_not_in_params_is_refused_with_those_that_are(bare, untouched):
    done = bare.run("python", "-m", "stages.compose", "variant=gptq-w4-g12")
    assert_refused(done, "variant=gptq-w4-g12", "gptq-w8-g128", "did you mean gptq-w4-g128?")
    assert_refused(bare.run("python", "-m", "stages.compose"), "variant: is not set; give variant=NAME")


def test_a_group_size_that_does_not_divide_a_layer_is_refused_with_those_that_do(pipeline, untouched):
    done = pipeline.stage("quantize", "method=awq", "group_size=256")
    assert_refused(done, "group_size=256: does not divide", "384", "group_size=32 or 64 or 128 divides them all")


def test_an_input_that_is_missing_names_the_command_that_makes_it(pipeline, untouched):
    """The command is run as it stands and makes the input."""
    try:
        done = pipeline.stage("quantize", "method=rtn", "model.trust_remote_code=true")
        assert_refused(done, "quantize needs the outputs of download and calibrate")
        for command in re.findall(r"(?m)^  (python -m stages.*)", done.err):
            made = pipeline.run(*shlex.split(command))
            assert made.code == 0, made.text
        again = pipeline.stage("quantize", "method=rtn", "model.trust_remote_code=true")
        assert again.code == 0, again.text
        (result,) = pipeline.root.glob("scratch/float/demo-*/download.json")
        assert json.loads(result.read_text())["status"] == "ok"
    finally:
        shutil.rmtree(pipeline.root / "scratch", ignore_errors=True)


def test_a_model_that_is_not_there_is_refused(bare, untouched):
    done = bare.stage("download", "model.path=/no/such")
    assert_refused(done, "model.path=/no/such: /no/such does not exist; give the folder that holds config.json")


@pytest.fixture
def model(root, tmp_path):
    """A copy of the demo model that may be spoilt."""
    return shutil.copytree(root / "assets" / "demo" / "model", tmp_path / "model")


def cut(path, size):
    os.truncate(path, size)


def spoil(path):
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: cut(folder / "model.safetensors", 10_000_000), ["model.safetensors", "10000000"]),
        (lambda folder: spoil(folder / "model.safetensors"), ["model.safetensors", "header"]),
        (lambda folder: cut(folder / "config.json", 100), ["config.json is not valid JSON", "100 bytes"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["has no tokenizer"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["has neither model.safetensors nor"]),
    ],
    ids=["cut off", "garbage", "config cut off", "no tokenizer", "no weights"],
)
def test_a_damaged_model_is_refused_by_file(bare, untouched, model, harm, words):
    harm(model)
    assert_refused(bare.stage("download", f"model.path={model}"), *words)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (EMPTY, [], ["2 of 2 rows are empty", "skip_empty"]),
        (EMPTY, ["calibration.skip_empty=true"], ["has no text (2 rows, 2 of them empty); give a file with text"]),
        ("", [], ["has no text"]),
        ('{"body": "a"}\n', [], ["text_field"]),
        ('{"text": "a"}\n{"text": \n', [], ["line 2"]),
        ('{"text": "one line is too little"}\n', [], ["n_samples"]),
    ],
)
def test_calibration_text_that_cannot_be_used_is_refused(pipeline, tmp_path, text, overrides, words):
    file = tmp_path / "own.jsonl"
    file.write_text(text)
    done = pipeline.stage("calibrate", f"calibration.sources.demo.path={file}", *overrides)
    assert_refused(done, str(file), *words)


def test_a_port_that_is_taken_is_refused_by_number(pipeline, untouched):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = pipeline.stage("serve_smoke", "method=float", f"serve.process.port={port}")
    assert_refused(done, f"port {port} of 127.0.0.1 is taken", "set serve.process.port=null")


def test_a_server_that_dies_while_it_loads_says_why(pipeline, untouched):
    done = pipeline.stage("serve_smoke", "method=float", "serve.max_model_len=100000")
    assert_refused(done, "while loading", "100000", "serve_smoke.log", code=1)


def test_a_result_that_is_damaged_is_named(pipeline, untouched):
    path = pipeline.root / "artifacts" / "gptq-w4-g128" / "quantize.json"
    whole = path.read_bytes(), path.stat()
    try:
        path.write_text('{"stage": ')
        done = pipeline.run("python", "-m", "stages.convert", "-cp", "../variants", "-cn", "gptq-w4-g128")
        assert_refused(done, "quantize.json is not valid JSON", "run the stage again")
    finally:
        path.write_bytes(whole[0])
        os.utime(path, ns=(whole[1].st_atime_ns, whole[1].st_mtime_ns))


@pytest.fixture
def small_disk(bare):
    """Make scratch/ a disk of its own, of some megabytes."""
    scratch = bare.root / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # logs of what was refused
    scratch.mkdir()

    def mount(megabytes: int) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(scratch)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small disk can be mounted by root alone")

    yield mount
    subprocess.run(["umount", str(scratch)], capture_output=True, check=False)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("stage", "overrides", "megabytes"),
    [
        ("download", [], 8),
        ("quantize", ["method=rtn"], 3),
        ("quantize", ["method=gptq"], 3),
        ("convert", ["method=gptq"], 3),
    ],
)
def test_a_full_disk_leaves_nothing_half_written(pipeline, small_disk, stage, overrides, megabytes):
    """The inputs are the pipeline's, on another disk."""
    small_disk(megabytes)
    before = pipeline.files()
    done = pipeline.stage(stage, *overrides)
    assert_refused(done, "disk is full", "run", code=1)
    assert pipeline.files() == before
    assert pipeline.leftovers() == []


@pytest.mark.usefixtures("untouched")
def test_a_full_disk_keeps_the_former_output(pipeline, small_disk):
    small_disk(12)
    assert pipeline.stage("quantize", "method=rtn", "variant=former").code == 0
    before = pipeline.files()
    result = pipeline.result("former", "quantize", "scratch")
    done = pipeline.stage("quantize", "method=rtn", "variant=former")
    assert_refused(done, "disk is full", code=1)
    assert pipeline.files() == before
    assert pipeline.leftovers() == []
    assert pipeline.result("former", "quantize", "scratch") == result


def test_a_failed_run_keeps_the_former_output(pipeline, tmp_path):
    text = tmp_path / "own.jsonl"
    options = [f"calibration.sources.demo.path={text}", "variant=former"]
    text.write_text('{"text": "%s"}\n' % ("An index is read where that is cheaper. " * 400))
    try:
        assert pipeline.stage("calibrate", *options).code == 0
        before = pipeline.files()
        assert "scratch/former/calibrate/tokens.safetensors" in before
        text.write_text(EMPTY)
        assert_refused(pipeline.stage("calibrate", *options), "2 of 2 rows are empty")
        assert pipeline.files() == before
        assert pipeline.leftovers() == []
    finally:
        shutil.rmtree(pipeline.root / "scratch", ignore_errors=True)


@pytest.mark.skipif(detect_platform() != "cpu", reason="a GPU serves it")
def test_a_refusal_of_the_serving_target_is_a_result_and_no_failure(pipeline):
    result = pipeline.result("gptq-w8-g128", "serve_smoke")
    assert (result["status"], result["metrics"]) == ("unsupported", {})
    assert "4 bits only" in result["reason"]
    verdict = pipeline.root / "artifacts" / "gptq-w8-g128" / "serve_smoke" / "verdict.json"
    assert json.loads(verdict.read_text())["supported"] is False
