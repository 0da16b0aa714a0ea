from __future__ import annotations

import errno
import json
import os
import socket

import pytest

from quantline.core.errors import DiskFullError, UserError
from quantline.core.files import partial
from quantline.pipeline import run as stage_module
from quantline.pipeline.config import parse
from quantline.pipeline.execute import execute
from quantline.pipeline.identity import combined, file_hashes, stage_fingerprint
from quantline.pipeline.run import StageRun
from stages.evaluate import changed_files


@pytest.fixture
def frozen(composed):
    """A configuration as `compose` freezes it."""

    def of(variant, *overrides):
        locks = {"reference": "r", "server": "s", "quantizer": "q", "tasks": "t"}
        frozen = {"variant": variant, "overrides": "", "backends": [], "locks": locks}
        return parse({**composed(*overrides), "frozen": frozen})

    return of


def write(name="value", text="x"):
    """A stage's work that writes one file."""

    def work(run):
        with run.output() as out:
            (out / name).write_text(text)
            run.metrics["size"] = len(text)

    return work


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_output_appears_when_the_block_ends(checkout, config):
    run = StageRun("convert", config(), checkout, ())
    with run.output() as out:
        (out / "file").write_text("x")
        assert not run.paths.output.exists()
    assert names(run.paths.output) == ["file"]
    assert names(run.paths.output.parent) == ["convert"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_an_output_vanishes_when_the_block_fails_and_the_former_one_stays(checkout, config, error):
    execute("convert", write(), config(), checkout, ())
    folder = checkout / "scratch" / "awq-w4-g128"
    before = names(folder)
    run = StageRun("convert", config(), checkout, ())

    def fail():
        with run.output() as out:
            (out / "other").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(folder) == before
    assert names(folder / "convert") == ["value"]


def test_an_error_names_the_output_not_the_folder_that_goes(checkout, config):
    run = StageRun("convert", config(), checkout, ())

    def fail():
        with run.output() as out:
            raise UserError(f"{out / 'model.safetensors'}: is damaged")

    with pytest.raises(UserError, match=rf"^{run.paths.output}/model\.safetensors: is damaged$"):
        fail()


def test_a_disk_that_is_full_at_the_last_moment_leaves_nothing_half_written(checkout, config, monkeypatch):
    def full(_source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr("quantline.core.files.os.replace", full)
    with pytest.raises(DiskFullError, match="the disk is full"):
        execute("convert", write(), config(), checkout, ())
    assert names(checkout / "scratch" / "awq-w4-g128") == []


def test_an_output_without_a_result_is_not_used(checkout, config, monkeypatch):
    def full(path, _value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(stage_module, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        execute("convert", write(), config(), checkout, ())
    assert names(checkout / "scratch" / "awq-w4-g128") == []


def test_the_next_stage_of_a_variant_removes_what_a_killed_one_left_and_not_what_a_living_one_makes(checkout, config):
    folder = checkout / "scratch" / "awq-w4-g128"
    dead = folder / f".quantize.partial-{socket.gethostname()}-{os.getppid()}"  # a number that another process has now
    dead.mkdir(parents=True)
    with partial(folder / "calibrate") as alive:
        execute("convert", write(), config(), checkout, ())
        assert not dead.exists()
        assert alive.exists()
    assert names(folder) == ["config.json", "convert", "convert.json"]


def test_an_interrupt_while_the_output_is_being_entered_leaves_nothing(checkout, config):
    def work(run):
        kept.append(run.output())
        kept[0].__enter__()
        raise KeyboardInterrupt

    kept = []
    with pytest.raises(KeyboardInterrupt):
        execute("convert", work, config(), checkout, ())
    assert names(checkout / "scratch" / "awq-w4-g128") == []


def test_a_result_describes_its_output(checkout, config):
    chosen = config("method=gptq", "bits=8")
    result = execute("convert", write(text="12345"), chosen, checkout, ("method=gptq", "bits=8"))
    output = checkout / "scratch" / "gptq-w8-g128" / "convert"
    assert json.loads(output.with_suffix(".json").read_text()) == result
    assert result["outputs"] == file_hashes(output)
    assert result["output_hash"] == combined(result["outputs"])
    assert result["fingerprint"] == stage_fingerprint(chosen, "convert", checkout)
    assert result["metrics"] == {"size": 5}
    assert result["status"] == "ok"
    assert result["environment"]["toolchain"] == "core"
    assert result["environment"]["versions"]["numpy"]
    assert 1 <= len(result["monitor"]["samples"]) <= 200
    assert result["monitor"]["peak"]["rss_bytes"] > 1e7


def test_a_run_by_hand_keeps_its_configuration_and_overrides(checkout, config):
    execute("convert", write(), config("method=gptq"), checkout, ("method=gptq", "model.name='a b'"))
    (path,) = checkout.glob("scratch/gptq-w4-g128-*/config.json")
    saved = json.loads(path.read_text())
    assert saved["config"]["method"]["name"] == "gptq"
    assert saved["overrides"] == """method=gptq 'model.name='"'"'a b'"'"''"""


def test_a_frozen_run_writes_to_artifacts_and_a_run_by_hand_to_scratch(checkout, config, frozen):
    execute("convert", write(), frozen("mine"), checkout, ())
    execute("convert", write(), config(), checkout, ())
    assert names(checkout / "artifacts" / "mine") == ["convert", "convert.json"]
    assert names(checkout / "scratch") == ["awq-w4-g128"]


def test_the_name_of_a_variant_is_checked_before_anything_runs(checkout, config):
    def work(_run):
        raise AssertionError("it ran")

    with pytest.raises(UserError, match=r"variant='\.\./x'"):
        execute("convert", work, config("variant=../x"), checkout, ())


MODELS = [("model=custom", f"model.path=/models/{name}") for name in ("a", "b/model", "b_model")]
MODELS += [("model.repo=a/a", f"model.revision={digit * 40}") for digit in "ab"]


def test_two_models_by_hand_keep_their_downloads_and_their_baselines_apart(checkout, config):
    for index, options in enumerate(MODELS):
        for stage in ("download", "evaluate"):
            execute(stage, write(text=f"{stage} {index}"), config(*options, "method=float"), checkout, options)
    for index, options in enumerate(MODELS):
        run = StageRun("evaluate", config(*options, "method=gptq", "variant=v1"), checkout, options)
        assert (run.input("download") / "value").read_text() == f"download {index}"
        assert (run.input("evaluate", baseline=True) / "value").read_text() == f"evaluate {index}"


def test_two_models_by_hand_have_variants_of_different_names(config):
    names = {StageRun("quantize", config(*options), None, options).variant for options in MODELS}
    assert len(names) == len(MODELS)


def test_the_baseline_by_hand_has_a_folder_that_no_name_takes(checkout, config):
    execute("evaluate", write(), config("method=float"), checkout, ("method=float",))
    for name in ("float", "shared"):
        with pytest.raises(UserError, match=f"a variant cannot be called {name}"):
            execute("evaluate", write(), config("method=gptq", f"variant={name}"), checkout, ())
    with pytest.raises(
        UserError, match=r"variant=v1: the float baseline of a model has its own folder, scratch/float/"
    ):
        execute("evaluate", write(), config("method=float", "variant=v1"), checkout, ())
    assert names(checkout / "scratch") == ["float"]


def test_a_frozen_variant_cannot_take_the_baselines_folder(checkout, frozen):
    with pytest.raises(UserError, match="a variant cannot be called float"):
        execute("evaluate", write(), frozen("float", "method=gptq"), checkout, ())


def test_baselines_with_other_options_do_not_replace_each_other(checkout, config):
    for tokens in (100, 200):
        options = ("method=float", f"evaluate.max_tokens={tokens}")
        execute("evaluate", write(text=str(tokens)), config(*options), checkout, options)
    for tokens in (100, 200):
        run = StageRun("evaluate", config("method=gptq", f"evaluate.max_tokens={tokens}"), checkout, ())
        assert (run.input("evaluate", baseline=True) / "value").read_text() == str(tokens)


def test_an_input_of_the_pipeline_that_is_missing_names_dvc(checkout, frozen):
    run = StageRun("convert", frozen("mine"), checkout, ())
    with pytest.raises(UserError, match=r"artifacts/mine/quantize is missing; run `dvc repro`"):
        run.input("quantize")


def test_the_download_has_one_place_for_all_variants(checkout, frozen):
    execute("download", write(), frozen("float", "method=float"), checkout, ())
    run = StageRun("calibrate", frozen("mine"), checkout, ())
    assert run.input("download") == checkout / "artifacts" / "shared" / "download"


def test_the_baseline_has_nothing_to_quantize(checkout, config):
    with pytest.raises(
        UserError, match=r"method=float: the baseline skips quantize; choose method=awq, .* or autoround"
    ):
        StageRun("quantize", config("method=float"), checkout, ()).refuse_float()


def test_the_float_model_is_served_as_downloaded_and_a_variant_as_converted(checkout, config):
    for stage, option in (("download", "method=float"), ("convert", "method=gptq")):
        execute(stage, write(), config(option), checkout, ())
    served = StageRun("serve_smoke", config("method=float"), checkout, ()).checkpoint()
    (downloaded,) = checkout.glob("scratch/float/demo-*/download")
    assert served == downloaded / "model"
    served = StageRun("serve_smoke", config("method=gptq"), checkout, ()).checkpoint()
    assert served == checkout / "scratch" / "gptq-w4-g128" / "convert"


def test_changed_files_of_a_checkpoint_are_counted(checkout, config):
    execute("convert", write(), config("method=gptq"), checkout, ())
    run = StageRun("evaluate", config("method=gptq"), checkout, ())
    assert changed_files(run) == 0
    folder = run.checkpoint()
    first = next(path for path in sorted(folder.rglob("*")) if path.is_file())
    first.write_bytes(first.read_bytes() + b" ")
    (folder / "added").write_text("")
    assert changed_files(run) == 2


def test_metrics_are_printed(checkout, config, capsys):
    def work(run):
        write()(run)
        run.status, run.reason = "unsupported", "no kernel"
        run.warnings.append("look")

    execute("convert", work, config(), checkout, ())
    said = capsys.readouterr().err
    assert "convert awq-w4-g128: unsupported in " in said
    assert "-> scratch/awq-w4-g128/convert" in said
    assert "note: look" in said
    assert "note: no kernel" in said


def test_only_convert_takes_a_checkpoint_of_another_tool(config, checkout):
    given = config("source=auto", "source.path=/some/where")
    StageRun("convert", given, checkout, ())
    for stage in ("plan", "download", "quantize"):
        with pytest.raises(UserError, match=rf"^source=auto: only stages.convert .* {stage} would not read it"):
            StageRun(stage, given, checkout, ())
