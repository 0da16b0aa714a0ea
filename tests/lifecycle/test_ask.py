from __future__ import annotations

import json
from dataclasses import replace

import pytest
from checkout_paths import DEMO_MODEL as MODEL

from quantline.core.errors import ConfigError
from quantline.lifecycle.ask import Asking, ask, faults_of, library_of
from quantline.lifecycle.serve import Subject
from quantline.pipeline.config import parse
from quantline.pipeline.run import StageRun


def test_fused_modules_and_flash_attention_exclude_each_other_by_name():
    told = faults_of(Asking(fuse=True, attention="flash_attention_2"), "awq", "cuda")
    assert len(told) == 1
    assert told[0].startswith("fuse=true attention=flash_attention_2: exclude each other")
    assert faults_of(Asking(fuse=True), "awq", "cuda") == []
    assert faults_of(Asking(attention="flash_attention_2"), "float", "cuda") == []


def test_what_needs_a_gpu_or_another_checkpoint_is_told_all_at_once():
    told = "\n".join(faults_of(Asking(fuse=True, attention="flash_attention_2", max_tokens=0), "gptq", "cpu"))
    for words in (
        "exclude each other",
        "fuses AWQ checkpoints",
        "fused modules need a GPU",
        "needs a GPU",
        "max_tokens",
    ):
        assert words in told


def test_each_method_has_its_own_library():
    assert library_of("awq", "cuda", fuse=True) == ("autoawq", "autoawq")
    assert library_of("awq", "cpu", fuse=False) == ("gptqmodel", "transformers")
    assert library_of("gptq", "cpu", fuse=False) == ("gptqmodel", "gptqmodel")
    assert library_of("float", "cuda", fuse=False) == ("reference", "transformers")


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
