import pytest

from quantline.pipeline.config import parse
from quantline.pipeline.identity import stage_fingerprint
from quantline.pipeline.stages import PIPELINE as STAGES


@pytest.fixture(scope="module")
def fingerprints(composed, root):
    def of(*overrides):
        config = parse(composed(*overrides))
        stages = [
            stage for stage in STAGES if config.method.name != "float" or stage not in ("quantize", "convert", "speed")
        ]
        return {stage: stage_fingerprint(config, stage, root) for stage in stages}

    return of


def changed(one, other):
    return [stage for stage in STAGES if one.get(stage) != other.get(stage)]


def test_bits_change_quantize_and_what_follows(fingerprints):
    assert changed(fingerprints("method=gptq"), fingerprints("method=gptq", "bits=8")) == [
        "quantize", "convert", "serve_smoke", "evaluate", "tasks", "speed"
    ]  # fmt: skip


def test_the_calibration_seed_changes_everything_but_the_download(fingerprints):
    assert changed(fingerprints(), fingerprints("calibration.seed=7")) == list(STAGES[1:])


def test_round_to_nearest_does_not_depend_on_calibration(fingerprints):
    assert changed(fingerprints("method=rtn"), fingerprints("method=rtn", "calibration.seed=7")) == ["calibrate"]


def test_threads_are_part_of_the_identity(fingerprints):
    assert "quantize" in changed(fingerprints(), fingerprints("threads=1"))


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu",
        "serve.process.port=9000",
        "serve.process.cpu_offload_gib=2",
        "serve.process.block_size=32",
        "toolchains.vllm=/opt/python",
        "tracking.uri=http://h",
        "variant=x",
    ],
)
def test_where_and_how_it_runs_is_no_part_of_the_identity(fingerprints, override):
    assert changed(fingerprints(), fingerprints(override)) == []


def test_limits_and_instruments_change_the_evaluation_alone(fingerprints):
    before = fingerprints()
    for override in ("evaluate.limits.kl_divergence=0.5", "evaluate.restore.layers=2", "evaluate.bootstrap.seed=1"):
        assert changed(before, fingerprints(override)) == ["evaluate"]
    assert changed(before, fingerprints("evaluate.max_tokens=500")) == ["serve_smoke", "evaluate"]


def test_tasks_depend_on_whether_the_server_takes_a_variant_and_not_on_what_it_scores(tmp_path, fingerprints):
    text = tmp_path / "own.jsonl"
    text.write_text("one")
    before = fingerprints(f"evaluate.path={text}")
    text.write_text("two")
    assert changed(before, fingerprints(f"evaluate.path={text}")) == ["serve_smoke", "evaluate"]
    assert changed(before, fingerprints(f"evaluate.path={text}", "bits=8", "method=gptq"))[-2:] == ["tasks", "speed"]
    # The questions of the smoke test come before the evaluation alone.
    assert changed(fingerprints(), fingerprints("serve.smoke.max_tokens=5")) == ["serve_smoke", "evaluate"]
    assert "tasks" in changed(fingerprints(), fingerprints("serve.enforce_eager=false"))


def test_the_baseline_is_the_same_whatever_bits_say(fingerprints):
    assert changed(fingerprints("method=float"), fingerprints("method=float", "bits=8")) == []


def test_a_calibration_file_is_known_by_its_content(tmp_path, fingerprints):
    text = tmp_path / "own.jsonl"
    text.write_text('{"text": "one"}\n')
    overrides = ("calibration=jsonl", f"calibration.path={text}")
    before = fingerprints(*overrides)
    text.write_text('{"text": "two"}\n')
    assert "calibrate" in changed(before, fingerprints(*overrides))
