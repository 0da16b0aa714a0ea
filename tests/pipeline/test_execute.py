from __future__ import annotations

import json
import socket

import pytest
from taken_files import write_taken
from tiny_quantized import write_float

from quantline.core.errors import ConfigError, UserError
from quantline.pipeline.config import parse
from quantline.pipeline.execute import run_checked, run_until, seeded
from quantline.pipeline.stages import STAGES, needed


def test_the_seed_goes_to_the_calibration_samples_too(composed):
    config = seeded(parse(composed("method=gptq")), 7)
    assert (config.seed, config.calibration.seed) == (7, 7)


@pytest.fixture
def everything(root, tmp_path):
    """A checkout in which every stage writes a file; its `runs` are (stage, variant), in order."""
    for name in ("conf", "envs", "assets"):
        (tmp_path / name).symlink_to(root / name)
    runs = []

    def work_of(stage):
        def work(run):
            runs.append((stage, run.variant))
            for earlier in needed(run.config, stage):
                run.input(earlier)
            if STAGES[stage].beside_float and not run.is_baseline:
                run.input(stage, baseline=True)
            with run.output() as out:
                (out / "file").write_text("text")
                write_taken(out, stage, "text")

        return work

    return tmp_path, {stage: work_of(stage) for stage in STAGES}, runs


def test_what_is_missing_runs_in_order_with_the_float_baseline_and_once(composed, everything):
    folder, work, runs = everything
    words = ("method=gptq", "bits=8", "tracking.enabled=false")
    config = parse(composed(*words))
    ran = run_until("evaluate", work, config, folder, words)
    assert [stage for stage, _ in runs] == [
        "download", "calibrate", "quantize", "convert", "serve_smoke", "serve_smoke", "evaluate", "evaluate",
    ]  # fmt: skip
    assert runs[-1] == ("evaluate", "gptq-w8-g128")
    assert len(ran) == 2
    assert "gptq-w8-g128" in ran
    runs.clear()
    assert run_until("evaluate", work, config, folder, words) == []
    assert runs == []


def test_another_text_of_the_evaluation_runs_no_task_again(composed, everything, tmp_path):
    folder, work, runs = everything
    text = tmp_path / "own.jsonl"
    words = ("method=gptq", f"evaluate.path={text}")
    for content in ("one", "two"):
        text.write_text(content)
        runs.clear()
        for stage in ("evaluate", "tasks"):
            run_until(stage, work, parse(composed(*words)), folder, words)
    assert {stage for stage, _ in runs} == {"serve_smoke", "evaluate"}


SHORT = {"max_position_embeddings": 512}


def test_by_hand_the_first_stage_refuses_what_a_model_in_a_folder_does_not_take(composed, everything):
    folder, work, runs = everything
    own = folder / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(SHORT))
    words = ["model=custom", f"model.path={own}", "calibration=demo", "method=gptq", "evaluate.window=512"]
    for stage in ("download", "calibrate", "quantize", "convert", "noise"):
        with pytest.raises(ConfigError, match=r"evaluate\.window=512: the model takes at most 512 tokens"):
            run_checked(stage, work[stage], parse(composed(*words)), folder, words)
    assert (runs, (folder / "scratch").exists()) == ([], False)
    words[-1] = "evaluate.window=511"
    run_checked("download", work["download"], parse(composed(*words)), folder, words)
    assert [stage for stage, _ in runs] == ["download"]


def test_by_hand_the_stage_after_the_download_refuses_what_a_model_of_the_hub_does_not_take(composed, everything):
    folder, work, runs = everything

    def download(run):
        with run.output() as out:
            (out / "model").mkdir()
            (out / "model" / "config.json").write_text(json.dumps(SHORT))

    words = ["model=qwen2_5_0_5b", "calibration=demo", "method=gptq", "evaluate.window=512"]
    config = parse(composed(*words))
    run_checked("download", download, config, folder, words)
    with pytest.raises(ConfigError, match=r"evaluate\.window=512: the model takes at most 512 tokens"):
        run_checked("calibrate", work["calibrate"], config, folder, words)
    assert runs == []


def test_the_calibration_of_a_model_of_the_hub_is_refused_where_quantizing_will_be(composed, everything):
    folder, work, runs = everything

    def download(run):
        with run.output() as out:
            path = write_float(out / "model", layers=2) / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 4096}))

    words = ["model=qwen2_5_0_5b", "calibration=demo", "method=gptq", "group_size=1024"]
    config = parse(composed(*words))
    run_checked("download", download, config, folder, words)
    with pytest.raises(UserError, match="group_size=1024: does not divide"):
        run_checked("calibrate", work["calibrate"], config, folder, words)
    assert runs == []


def test_a_stage_that_the_float_baseline_does_not_have_is_refused_before_anything_runs(composed, everything):
    folder, work, runs = everything
    for until in ("calibrate", "quantize", "convert", "speed"):
        with pytest.raises(
            UserError, match=rf"until={until}: the float baseline skips it; give until=download, serve_smoke"
        ):
            run_until(until, work, parse(composed("method=float")), folder, ("method=float",))
    assert runs == []


def test_another_option_runs_only_what_depends_on_it(composed, everything):
    folder, work, runs = everything
    run_until("evaluate", work, parse(composed("method=gptq")), folder, ("method=gptq",))
    runs.clear()
    run_until("evaluate", work, parse(composed("method=gptq", "bits=8")), folder, ("method=gptq", "bits=8"))
    assert runs == [(stage, "gptq-w8-g128") for stage in ("quantize", "convert", "serve_smoke", "evaluate")]


def test_the_run_ends_at_the_stage_that_refuses_and_what_was_made_stays(composed, everything):
    folder, work, runs = everything

    def refuse(_run):
        raise UserError("no")

    config = parse(composed("method=gptq"))
    with pytest.raises(UserError, match="no"):
        run_until("convert", {**work, "convert": refuse}, config, folder, ("method=gptq",))
    runs.clear()
    run_until("convert", work, config, folder, ("method=gptq",))
    assert [stage for stage, _ in runs] == ["convert"]


def test_a_stage_whose_former_run_was_killed_says_that_it_starts_anew(composed, everything, capfd):
    folder, work, _ = everything
    config, words = parse(composed("method=rtn", "variant=v", "tracking.enabled=false")), ("method=rtn", "variant=v")
    run_until("convert", work, config, folder, words)
    assert "killed" not in capfd.readouterr().err
    half = folder / "scratch" / "v" / f".convert.partial-{socket.gethostname()}-999999990"
    half.mkdir()
    run_checked("convert", work["convert"], config, folder, words)
    assert "a former run of convert was killed before it ended; this one starts anew" in capfd.readouterr().err
    assert not half.exists()
    run_checked("convert", work["convert"], config, folder, words)
    assert "killed" not in capfd.readouterr().err
