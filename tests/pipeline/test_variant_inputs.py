from __future__ import annotations

import hashlib

import pytest

from quantline.pipeline.compose import freeze
from quantline.pipeline.variant_inputs import inputs_of_variants


@pytest.fixture
def checkout(root, tmp_path):
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


def test_every_file_of_a_frozen_variant_is_named_with_the_stages_that_read_it(checkout):
    own = {"own.jsonl": hashlib.sha256(b'{"text": "a"}\n').hexdigest()}
    found = inputs_of_variants(checkout)
    assert set(found) == {"float", "own"}
    assert found["own"] == {"calibrate": own, "serve_smoke": own, "evaluate": own, "tasks": {}}
    assert set(found["float"]) == {"download", "serve_smoke", "evaluate", "tasks"}
    assert found["float"]["evaluate"] == own
    assert "model.safetensors" in found["float"]["download"]["assets/demo/model"]
    assert list(found["float"]["tasks"]) == ["assets/demo/evaluation.jsonl"]


def test_a_changed_file_changes_the_stages_that_read_it_alone(checkout):
    before = inputs_of_variants(checkout)
    (checkout / "own.jsonl").write_text('{"text": "b"}\n')
    after = inputs_of_variants(checkout)
    changed = {
        (name, stage) for name in after for stage in after[name] if after[name][stage] != before[name][stage]
    }  # fmt: skip
    assert changed == {(name, stage) for name in ("own", "float") for stage in ("serve_smoke", "evaluate")} | {
        ("own", "calibrate")
    }
