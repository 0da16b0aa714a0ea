from __future__ import annotations

import copy
import json
import shutil

import pytest
import yaml
from taken_files import write_taken

from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.pipeline.compose import freeze
from quantline.pipeline.config import parse
from quantline.pipeline.execute import execute
from quantline.pipeline.records import manual_record, pipeline_records, variant_record
from stages.evaluate import noise_floor

LINES = {"one": "method=gptq bits=8", "two": "method=awq"}
EACH = ["download", "calibrate", "quantize", "convert", "serve_smoke", "evaluate", "tasks"]


class Pipeline:
    """A checkout in which a stage writes a file with a given text."""

    def __init__(self, root, folder):
        self.folder = folder
        self.composed = {}  # by name and what params.yaml said: composing takes most of a test's time
        for name in ("conf", "envs", "assets"):
            (folder / name).symlink_to(root / name)
        self.params(**LINES)

    def params(self, **lines):
        content = {"shared": "model=demo", "baseline": "method=float", "variants": lines}
        (self.folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def compose(self, name):
        key = name, (self.folder / "params.yaml").read_text()
        if key not in self.composed:
            values = yaml.safe_load(freeze(self.folder, name).read_text())
            self.composed[key] = parse(
                {key: value for key, value in values.items() if key not in ("defaults", "hydra")}
            )
        return self.composed[key]

    def run(self, stage, name, text="same", taken="same"):
        before = {
            "calibrate": ["download"], "quantize": ["download", "calibrate"], "convert": ["quantize"],
            "serve_smoke": ["download"] if name == "float" else ["convert"], "evaluate": ["serve_smoke"],
            "tasks": ["serve_smoke"],
        }  # fmt: skip

        def work(run):
            for earlier in before.get(stage, []):
                run.input(earlier)
            if stage in ("evaluate", "tasks") and name != "float":
                run.input(stage, baseline=True)
            with run.output() as out:
                (out / "file").write_text(text)
                write_taken(out, stage, taken)

        execute(stage, work, self.compose(name), self.folder, ())

    def stages(self, name):
        return {record.name: [result["stage"] for result in record.results] for record in self.records()}.get(name)

    def records(self):
        return pipeline_records(self.folder)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """Every stage has run once, for all tests of this file."""
    made = Pipeline(root, tmp_path_factory.mktemp("pipeline"))
    for stage in ("download", "serve_smoke", "evaluate", "tasks"):
        made.run(stage, "float")
    for name in LINES:
        for stage in EACH[1:]:
            made.run(stage, name)
    return made


@pytest.fixture
def pipeline(whole, tmp_path):
    """A copy of it that a test may change, in the test's own folder."""
    shutil.copytree(whole.folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    copied = copy.copy(whole)
    copied.folder, copied.composed = tmp_path, dict(whole.composed)
    return copied


def test_every_variant_comes_with_all_its_stages_the_baseline_first(pipeline):
    records = pipeline.records()
    assert [record.name for record in records] == ["float", "one", "two"]
    assert pipeline.stages("float") == ["download", "serve_smoke", "evaluate", "tasks"]
    assert pipeline.stages("one") == pipeline.stages("two") == EACH
    assert records[1].overrides == "model=demo method=gptq bits=8"
    assert records[1].config["bits"] == 8
    assert "hydra" not in records[1].config


def test_a_variant_that_has_not_run_is_not_there(pipeline):
    pipeline.params(**LINES, three="method=rtn")
    assert [record.name for record in pipeline.records()] == ["float", "one", "two"]
    pipeline.compose("three")
    assert [record.name for record in pipeline.records()] == ["float", "one", "two", "three"]
    assert pipeline.stages("three") == ["download"]


def test_a_variant_that_params_name_no_longer_is_not_there(pipeline):
    pipeline.params(one=LINES["one"])
    assert [record.name for record in pipeline.records()] == ["float", "one"]


def test_stages_that_are_out_of_date_are_left_out(pipeline):
    pipeline.params(one="method=gptq bits=4", two=LINES["two"])
    pipeline.compose("one")
    assert pipeline.stages("one") == ["download", "calibrate"]
    pipeline.run("quantize", "one", "other weights")
    assert pipeline.stages("one") == ["download", "calibrate", "quantize"]
    assert pipeline.stages("two") == EACH


def test_an_equal_output_from_other_options_keeps_later_stages_current(pipeline):
    pipeline.params(one=f"{LINES['one']} convert.target=gptq", two=LINES["two"])
    pipeline.run("convert", "one")
    assert pipeline.stages("one") == EACH


def test_a_changed_output_makes_later_stages_out_of_date(pipeline):
    pipeline.run("convert", "one", "another layout")
    assert pipeline.stages("one") == EACH[:4]


def test_a_stage_that_takes_one_file_of_an_output_stays_current_while_that_file_is_the_same(pipeline):
    pipeline.run("calibrate", "one", "a manifest with another hash")
    assert pipeline.stages("one") == EACH
    pipeline.run("serve_smoke", "one", "scores of another text")
    assert pipeline.stages("one") == [stage for stage in EACH if stage != "evaluate"]
    pipeline.run("serve_smoke", "one", taken="another verdict")
    assert pipeline.stages("one") == [stage for stage in EACH if stage not in ("evaluate", "tasks")]
    pipeline.run("calibrate", "one", taken="other tokens")
    assert pipeline.stages("one") == ["download", "calibrate"]


def test_results_that_name_whole_outputs_of_an_older_version_stay_current(pipeline):
    path = pipeline.folder / "artifacts" / "one" / "quantize.json"
    result = json.loads(path.read_text())
    assert set(result["inputs"]) == {"download", "calibrate/tokens.safetensors"}
    whole = json.loads(path.with_name("calibrate.json").read_text())["output_hash"]
    for content, stages in ((whole, EACH), ("0", ["download", "calibrate"])):
        path.write_text(json.dumps({**result, "inputs": {"calibrate": content}}))
        assert pipeline.stages("one") == stages


def test_another_baseline_drops_the_evaluations_that_were_compared_with_the_former(pipeline):
    pipeline.run("evaluate", "float", "another")
    assert pipeline.stages("one") == pipeline.stages("two") == [stage for stage in EACH if stage != "evaluate"]


def test_the_log_of_a_stage_is_known_and_is_none_of_its_files(pipeline):
    (pipeline.folder / "artifacts" / "one" / "quantize.log").write_text("said")
    (record,) = [record for record in pipeline.records() if record.name == "one"]
    logs = {result["stage"]: result["log"] for result in record.results}
    assert logs["quantize"] == "artifacts/one/quantize.log"
    assert logs["convert"] is None
    assert all(result["files"] == [] for result in record.results)


def test_a_damaged_result_is_an_error_that_names_it(pipeline):
    (pipeline.folder / "artifacts" / "one" / "quantize.json").write_text("{")
    with pytest.raises(UserError, match=r"one/quantize\.json is not valid JSON"):
        pipeline.records()


def test_a_variant_by_hand_is_named_apart_from_the_pipelines(root, composed, tmp_path):
    for name in ("envs", "assets"):
        (tmp_path / name).symlink_to(root / name)

    def work(run):
        with run.output():
            pass

    execute("convert", work, parse(composed("bits=4", "variant=one")), tmp_path, ("bits=4", "variant=one"))
    record = manual_record(tmp_path, "by-hand/one")
    assert record.name == "by-hand/one"
    assert record.overrides == "bits=4 variant=one"
    assert [result["stage"] for result in record.results] == ["convert"]
    saved = json.loads((tmp_path / "scratch" / "one" / "config.json").read_text())
    (tmp_path / "scratch" / "one" / "config.json").write_text(json.dumps({**saved, "config": composed("seed=3")}))
    assert manual_record(tmp_path, "by-hand/one").results == []


@pytest.fixture
def by_hand(root, composed, tmp_path):
    """Run stages by hand; each writes its name and reads the stage before it."""
    for name in {"conf", "envs", "assets"} - {path.name for path in tmp_path.iterdir()}:
        (tmp_path / name).symlink_to(root / name)

    def run(name, *overrides, stages):
        def work(run):
            for earlier in {"calibrate": ["download"], "quantize": ["download", "calibrate"]}.get(run.stage, []):
                run.input(earlier)
            with run.output() as out:
                (out / "file").write_text(run.stage)
                write_taken(out, run.stage, "text")

        options = (*overrides, f"variant={name}")
        for stage in stages:
            execute(stage, work, parse(composed(*options)), tmp_path, options)

    return run


def test_what_a_run_by_hand_took_from_another_belongs_to_its_record(by_hand, tmp_path, capsys):
    by_hand("first", "method=gptq", stages=("download", "calibrate", "quantize"))
    by_hand("second", "method=gptq", "bits=8", stages=("quantize",))
    record = manual_record(tmp_path, "by-hand/second")
    assert [result["stage"] for result in record.results] == ["download", "calibrate", "quantize"]
    assert record.outputs["calibrate"] == tmp_path / "scratch" / "first" / "calibrate"
    assert record.outputs["quantize"] == tmp_path / "scratch" / "second" / "quantize"
    assert "left out" not in capsys.readouterr().err


def test_a_result_by_hand_of_other_options_is_left_out_with_the_command_that_makes_it(by_hand, tmp_path, capsys):
    by_hand("one", "method=gptq", stages=("download", "calibrate", "quantize"))
    by_hand("one", "method=gptq", "calibration.seed=5", stages=("calibrate",))
    record = manual_record(tmp_path, "by-hand/one")
    assert [result["stage"] for result in record.results] == ["download", "calibrate"]
    command = "python -m stages.quantize method=gptq calibration.seed=5 variant=one"
    assert capsys.readouterr().err.strip().endswith(f"quantize is of other options or code and was left out; to make it, "
                                                    f"run: {command}")  # fmt: skip
    assert record.remedy("quantize") == command
    by_hand("one", *command.split()[3:-1], stages=("quantize",))
    assert len(manual_record(tmp_path, "by-hand/one").results) == 3
    assert capsys.readouterr().err.count("left out") == 0


def test_a_record_is_that_of_the_run_with_exactly_that_name(pipeline, by_hand):
    by_hand("one", "method=gptq", stages=("download",))
    by_hand("three", "method=gptq", stages=("download", "calibrate"))
    assert (
        variant_record(pipeline.folder, "one").outputs["convert"] == pipeline.folder / "artifacts" / "one" / "convert"
    )
    assert variant_record(pipeline.folder, "by-hand/three").name == "by-hand/three"
    with pytest.raises(UserError, match=r"variant=three: .*by-hand/three \(did you mean by-hand/three\?\)"):
        variant_record(pipeline.folder, "three")
    with pytest.raises(UserError, match="by-hand/two: is not one of the results here"):
        variant_record(pipeline.folder, "by-hand/two")


def test_a_name_under_which_nothing_was_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="by-hand/one: no stage was run by hand under that name"):
        manual_record(tmp_path, "by-hand/one")


def test_only_a_noise_result_of_the_same_identity_is_taken(tmp_path):
    runs = [{"seed": seed, "nll_difference": lost} for seed, lost in enumerate((0.02, 0.01, 0.04))]
    result = {
        "schema": 1, "stage": "noise", "status": "ok", "metrics": {}, "fingerprint": "f3", "output_hash": "h",
        "tables": {"runs": runs},
    }  # fmt: skip
    write_json(tmp_path / "scratch" / "v" / "noise.json", result)
    found = noise_floor(tmp_path, "f{}".format)
    assert found == {
        "runs": 3, "low": 0.01, "high": 0.04, "seeds": [0, 1, 2], "unit": "nats/token", "output_hash": "h"
    }  # fmt: skip
    assert noise_floor(tmp_path, "other{}".format) is None
    assert noise_floor(tmp_path / "nowhere", "f{}".format) is None
