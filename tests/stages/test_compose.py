"""Freezing a variant asks what `stages.plan` asks, where its model is on this machine."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf
from tiny_quantized import write_float

from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.pipeline.compose import frozen_variant
from quantline.pipeline.config import parse
from quantline.pipeline.identity import options_fingerprint
from stages import compose


@pytest.fixture
def checkout(root, tmp_path, monkeypatch):
    for name in ("conf", "envs", "assets"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.setattr(compose, "ROOT", tmp_path)
    return tmp_path


def frozen(checkout, shared, line):
    (checkout / "params.yaml").write_text(f"shared: {shared}\nbaseline: method=float\nvariants:\n  own: {line}\n")
    compose.compose(OmegaConf.create({"variant": "own"}))
    return (checkout / "variants" / "own.yaml").is_file()


def test_a_variant_that_a_model_in_a_folder_does_not_allow_is_not_frozen(checkout):
    with pytest.raises(UserError, match="group_size=256: does not divide"):
        frozen(checkout, "model=demo", "method=awq group_size=256")
    assert not (checkout / "variants").exists()
    assert frozen(checkout, "model=demo", "method=awq")


def test_a_model_of_the_hub_is_asked_when_it_is_downloaded_and_no_other_in_its_place(checkout):
    line, shared = "method=gptq group_size=1024", "model=qwen2_5_0_5b"
    assert frozen(checkout, shared, line)
    download = checkout / "artifacts" / "shared" / "download"
    write_float(download / "model", layers=2)
    write_json(download.with_suffix(".json"), {"options": "of another model", "output_hash": "h"})
    assert frozen(checkout, shared, line)
    config = parse(frozen_variant(checkout, "own"))
    result = {"options": options_fingerprint(config, "download", checkout), "output_hash": "h"}
    download.with_suffix(".json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="group_size=1024: does not divide"):
        frozen(checkout, shared, line)
