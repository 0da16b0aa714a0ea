from __future__ import annotations

import hashlib
import re

import pytest
import yaml

from quantline.pipeline.compose import freeze
from quantline.pipeline.stages import PIPELINE, STAGES, baseline_stages
from quantline.pipeline.variant_inputs import inputs_of_variants


@pytest.fixture
def checkout(root, tmp_path, composed, monkeypatch):
    monkeypatch.setattr("quantline.pipeline.compose.compose_values", lambda conf, overrides: composed(*overrides))
    for name in ("conf", "envs", "assets"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "own.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "params.yaml").write_text(
        "shared: evaluate.path=own.jsonl\nbaseline: method=float\nvariants:\n"
        "  own: method=gptq calibration=domain calibration.sources.code.path=own.jsonl tasks=none\n  later: method=gptq\n"
    )
    for name in ("float", "own"):
        freeze(tmp_path, name)
    return tmp_path


def test_every_file_of_a_frozen_variant_is_named_with_its_hash(checkout):
    files = inputs_of_variants(checkout)["files"]
    assert files["own.jsonl"] == hashlib.sha256(b'{"text": "a"}\n').hexdigest()
    assert "model.safetensors" in files["assets/demo/model"]
    assert set(files) == {"own.jsonl", "assets/demo/model", "assets/demo/evaluation.jsonl"}


def test_every_stage_of_a_frozen_variant_has_a_hash_and_a_shared_one_is_the_baselines(checkout):
    reads = inputs_of_variants(checkout)["reads"]
    assert {name: set(stages) for name, stages in reads.items()} == {
        "float": set(baseline_stages()), "own": {name for name in PIPELINE if not STAGES[name].shared}
    }  # fmt: skip
    assert all(re.fullmatch("[0-9a-f]{16}", value) for stages in reads.values() for value in stages.values())


def changed(before, after):
    """(variant, stage) of the hashes that differ."""
    return {(name, stage) for name in after for stage in after[name] if after[name][stage] != before[name][stage]}


def test_a_changed_file_changes_the_stages_that_read_it_alone(checkout):
    before = inputs_of_variants(checkout)["reads"]
    (checkout / "own.jsonl").write_text('{"text": "b"}\n')
    assert changed(before, inputs_of_variants(checkout)["reads"]) == {
        (name, stage) for name in ("own", "float") for stage in ("serve_smoke", "evaluate")
    } | {("own", "calibrate")}


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("bits", 8, {"quantize"}),
        ("speed.rounds", 77, {"speed"}),
        ("evaluate.stride", 64, {"serve_smoke", "evaluate"}),
        ("frozen.locks.server", "another", {"convert", "serve_smoke", "tasks", "speed"}),
        ("tracking.timeout_seconds", 77, set()),
    ],
)
def test_a_changed_option_changes_the_stages_that_read_it_alone(checkout, key, value, stages):
    before = inputs_of_variants(checkout)["reads"]
    path = checkout / "variants" / "own.yaml"
    values = yaml.safe_load(path.read_text())
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place[section]
    assert place[last] != value
    place[last] = value
    path.write_text(yaml.safe_dump(values))
    assert changed(before, inputs_of_variants(checkout)["reads"]) == {("own", stage) for stage in stages}


def test_another_revision_on_the_hub_reruns_the_download_and_behind_it_what_reads_other_files(checkout, root):
    params = checkout / "params.yaml"
    text = params.read_text().replace("shared: ", "shared: model=custom model.repo=owner/name model.revision={} ")
    found = []
    for digit in "ab":
        params.write_text(text.format(digit * 40))
        for name in ("float", "own"):
            freeze(checkout, name)
        found.append(inputs_of_variants(checkout)["reads"])
    assert changed(*found) == {("float", "download")}
    # Whose output the stages behind it watch, and whose hash DVC watches in inputs.yaml.
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    assert {"inputs.yaml": ["reads.float.download"]} in stages["download"]["params"]
    for stage in ("calibrate", "quantize"):
        assert "artifacts/shared/download" in stages[stage]["do"]["deps"]


def test_the_stages_of_several_models_are_apart(checkout):
    text = (checkout / "params.yaml").read_text()
    alone = inputs_of_variants(checkout)["reads"]
    models = "models:\n  demo: model=demo\n  mine: model=demo calibration.seed=7\n"
    (checkout / "params.yaml").write_text(text.replace("baseline:", f"{models}baseline:"))
    for name in ("demo/float", "demo/own", "mine/float", "mine/own"):
        freeze(checkout, name)
    found = inputs_of_variants(checkout)["reads"]
    assert found["demo"] == alone
    assert changed(alone, found["mine"]) == {("own", "calibrate")}
