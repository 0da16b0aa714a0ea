"""How captures become a verdict; that a real server tokenizes and scores them is in tests/serving/test_server_vllm.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import sections
from tiny_model import write_tokenizer
from tiny_quantized import write_float

from quantline.core.errors import UserError
from quantline.evaluation.shadow_verdict import judge
from quantline.lifecycle.serve import Typed
from quantline.lifecycle.shadow import Question, _note_alarm, served_tokens, shadow, shadow_faults
from quantline.serving.fleet.captures import Capture


def test_a_promotion_can_ask_for_a_sound_verdict_about_these_files(tmp_path):
    files = {"model.safetensors": "abc"}
    folder = tmp_path / "scratch" / ".fleet" / "prod"
    folder.mkdir(parents=True)

    def faults(**verdict):
        (folder / "shadow.json").write_text(json.dumps({"variant": "w4", "files": files, **verdict}))
        return shadow_faults(tmp_path, "prod", "w4", files)

    assert shadow_faults(tmp_path, None, "w4", files) == []
    told = shadow_faults(tmp_path, "prod", "w4", files)[0]
    assert told.endswith("has no verdict; run: python -m stages.shadow variant=w4 fleet.name=prod")
    assert faults(verdict="sound") == []
    assert "say worse, required is sound" in faults(verdict="worse")[0]
    assert "is about other files, of w4" in faults(verdict="sound", files={"model.safetensors": "abd"})[0]


def test_without_captures_it_says_how_to_get_some(composed, tmp_path):
    with pytest.raises(UserError, match=r"has no captured requests; start the fleet with capture\.share=0\.1"):
        shadow(tmp_path, Typed(composed(), []), Question("w4"))


def test_a_variant_with_another_tokenizer_is_refused_before_a_server_starts(composed, tmp_path, monkeypatch):
    folders = [write_float(tmp_path / name) for name in ("own", "other")]
    for number, folder in enumerate(folders):
        write_tokenizer(folder, *([["other words than these"]] if number else []))
    capture = Capture("1", "low", "own", None, "An index is", " a list.", 200)
    monkeypatch.setattr("quantline.lifecycle.shadow.captures", lambda folder: [capture])
    with pytest.raises(UserError, match="have different tokenizers, so that their scores cannot be compared"):
        shadow(tmp_path, Typed(composed(), []), Question(str(folders[1]), str(folders[0])))


def test_a_server_takes_what_it_is_told_to_take_or_what_its_model_does(tmp_path):
    subject = SimpleNamespace(folder=write_float(tmp_path / "m"))
    positions = json.loads((subject.folder / "config.json").read_text())["max_position_embeddings"]
    assert served_tokens(subject, sections.server(max_model_len=99)) == 99
    assert served_tokens(subject, sections.server()) == positions


def test_a_verdict_raises_an_alarm_and_a_sound_one_takes_it_back(tmp_path):
    floats = [np.full(10, -2.0) for _ in range(30)]

    def verdict(loss):
        return judge([one - loss for one in floats], floats, most_increase=0.01, how=sections.bootstrap(resamples=100))

    def alarms():
        return json.loads((tmp_path / "alarms.json").read_text())

    _note_alarm(tmp_path, "w4", verdict(0.1))
    assert alarms() == {"w4": "+0.1000 nats a token on 30 captured requests"}
    _note_alarm(tmp_path, "w8", verdict(0.0))
    assert list(alarms()) == ["w4"]
    _note_alarm(tmp_path, "w4", verdict(0.0))
    assert alarms() == {}


def test_an_alarm_is_under_the_name_that_the_fleet_gives_a_variant(tmp_path):
    loss = [np.full(20, -1.0)] * 30
    worse = judge([one - 0.5 for one in loss], loss, most_increase=0.05, how=sections.bootstrap(resamples=200))
    _note_alarm(tmp_path, "by-hand/w4", worse)
    assert list(json.loads((tmp_path / "alarms.json").read_text())) == ["by-hand-w4"]
