"""`python -m stages.convert` on a folder: what a user types, what appears, and what does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import quantization_of
from quantline.checkpoints.layouts import quantize_rtn
from quantline.checkpoints.layouts.msmodelslim.files import write_files
from quantline.core.errors import ConfigError, UserError
from quantline.toolchains.environments import locked_version
from tests.conversion.test_convert_msmodelslim import FIXTURES, needs_fixtures


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    weight = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    linears = {f"model.layers.{index}.mlp.up_proj": quantize_rtn(weight, 4, 32, True) for index in range(2)}
    write_files(folder, linears, {"model.embed_tokens.weight": np.ones((16, 128), np.float16)})
    (folder / "config.json").write_text("{}")  # of no architecture: it is not a whole model
    return folder


def convert(root, *overrides, **options):
    command = [sys.executable, "-m", "stages.convert", *overrides]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, **options)


@needs_fixtures
@pytest.mark.e2e
def test_the_documented_command_makes_a_checkpoint_with_its_proof(root, tmp_path):
    folder, out = FIXTURES / "w4a16_g64_awq_asym", tmp_path / "out"
    scratch = set((root / "scratch").glob("*")) if (root / "scratch").is_dir() else set()
    done = convert(root, "source=msmodelslim", f"source.path={folder}", "convert.target=awq", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert (
        "msmodelslim safe_tensor to awq_gemm: codes and zero points of 14 linears are equal on the disk" in done.stderr
    )
    assert quantization_of(out).layout == "awq_gemm"
    assert json.loads((out / "conversion_proof.json").read_text())["counts"]["linears"] == 14
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert scratch == (set((root / "scratch").glob("*")) if (root / "scratch").is_dir() else set())


@pytest.mark.e2e
def test_auto_recognises_what_a_folder_holds_and_converts_on(root, tmp_path, source):
    for target, folder, layout in (
        ("gptq", source, "gptq"), ("compressed_tensors", tmp_path / "gptq", "compressed_tensors"),
        ("awq", tmp_path / "compressed_tensors", "awq_gemm"),
    ):  # fmt: skip
        out = tmp_path / target
        done = convert(root, "source=auto", f"source.path={folder}", f"convert.target={target}", f"out={out}")
        assert done.returncode == 0, done.stderr
        assert quantization_of(out).layout == layout


def test_an_output_that_holds_something_is_refused_and_stays(root, tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    done = convert(root, "source=auto", f"source.path={source}", f"out={out}")
    assert done.returncode == 2
    assert "exists and is not an empty folder; remove it or give another folder" in done.stderr
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_output_within_the_source_is_refused(root, source):
    done = convert(root, "source=auto", f"source.path={source}", f"out={source / 'out'}")
    assert done.returncode == 2
    assert "give a folder outside of it" in done.stderr


def test_refusals_exit_with_2_and_leave_nothing(root, tmp_path, source):
    done = convert(
        root,
        "source=auto",
        f"source.path={source}",
        "convert.target=gptq",
        "convert.shard_size=4XB",
        f"out={tmp_path / 'o'}",
    )
    assert done.returncode == 2
    assert "convert.shard_size=4XB: give a size such as 4GB" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


SLOW = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/src"]
from quantline.conversion import write
work = write._linear
def slow(*arguments):
    outcome = work(*arguments)
    print("one", flush=True)
    time.sleep(0.5)
    return outcome
write._linear = slow
sys.argv = ["convert", "source=auto", "source.path=" + {source!r}, "convert.target=gptq", "out=" + {out!r}]
from stages.convert import convert
convert()
"""


@pytest.mark.e2e
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_checkpoint_and_can_be_run_again(root, tmp_path, source, how):
    out = tmp_path / "out"
    code = SLOW.format(root=str(root), source=str(source), out=str(out))
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline().startswith("one")
        running.send_signal(how)
        _, errors = running.communicate(timeout=300)  # it took 38 s on a machine with nine others at work
    assert running.returncode == (130 if how != signal.SIGKILL else -9), errors
    assert not out.exists()
    if how != signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    done = convert(root, "source=auto", f"source.path={source}", "convert.target=gptq", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not list(out.glob(".*"))


def test_options_that_do_not_go_together_are_refused(composed):
    from quantline.pipeline.config import parse

    for overrides, message in (
        (["source.path=x"], "source.path=x: the source is the pipeline's own checkpoint; add source=auto"),
        (["source=auto"], "source.path: is not set; give the checkpoint's folder, source=auto source.path=DIR"),
        (["out=x"], "out=x: needs source=auto, msmodelslim or gguf"),
        (["convert.for=tgi"], "convert.for=tgi: allowed are vllm"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(composed(*overrides))
        assert message in str(caught.value)


def test_new_options_at_their_defaults_are_no_part_of_the_identity(composed, root):
    from quantline.pipeline.config import parse
    from quantline.pipeline.identity import options_of

    assert options_of(parse(composed()), "convert", root) == {"convert": {"target": "auto"}, "runtime": "vllm"}
    changed = options_of(parse(composed("convert.requantize_outliers=true")), "convert", root)
    assert changed["convert"] == {"target": "auto", "requantize_outliers": True}


def test_a_configuration_saved_by_hand_is_read_again(composed):
    from quantline.pipeline.config import parse

    config = parse(composed("convert.for=vllm"))
    assert config.convert.must_serve == "vllm"
    assert parse(config.model_dump(exclude={"frozen"})) == config


def test_the_servers_version_comes_from_its_lock(root):
    assert locked_version(root, "vllm", "cpu").startswith("0.")
    assert locked_version(root, "vllm", "cuda").startswith("0.")
    with pytest.raises(UserError, match="toolchain nothing-cpu"):
        locked_version(root, "nothing", "cpu")


@pytest.mark.e2e
def test_the_clock_is_not_part_of_what_is_written(root, tmp_path, source):
    outputs = []
    for label in ("a", "b"):
        convert(root, "source=auto", f"source.path={source}", f"out={tmp_path / label}")
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / label).iterdir()})
        time.sleep(0.01)
    assert outputs[0] == outputs[1]
    assert os.path.isdir(tmp_path / "a")
