from __future__ import annotations

import json
from dataclasses import replace

import pytest
from checkout_paths import DEMO_MODEL as MODEL

from quantline.core.errors import ConfigError
from quantline.evaluation.speed.own_library import Asking
from quantline.lifecycle.ask import ask
from quantline.lifecycle.serve import Subject
from quantline.pipeline.config import parse
from quantline.pipeline.run import StageRun


@pytest.mark.toolchain("reference")
def test_questions_in_a_row_are_answered_with_memory_before_and_after(composed, root, tmp_path):
    config = parse(composed("method=float"))
    subject = Subject("float", MODEL, config, proven=True)
    run = StageRun("serve", config, root, ())
    asked = Asking(("What is an index?", "What is a list?"), 6, "eager")
    found, path = ask(root, run, subject, asked, tmp_path / "out" / "asked.json")
    assert [answer["question"] for answer in found["answers"]] == list(asked.questions)
    assert all(0 < answer["tokens"] <= 6 and answer["answer"] for answer in found["answers"])
    assert found["memory_after"] >= found["memory_before"] > 50e6
    assert (found["linear"], found["attention"]) == ("Linear", "eager")
    assert json.loads(path.read_text())["variant"] == "float"
    with pytest.raises(ConfigError, match="fuse=true: AutoAWQ fuses AWQ checkpoints"):
        ask(root, run, subject, replace(asked, fuse=True, attention=None), None)
