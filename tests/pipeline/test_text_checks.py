from __future__ import annotations

import json
import os
from contextlib import chdir

import pytest

from quantline.core.errors import UserError
from quantline.data.calibration import build
from quantline.data.windows import build_windows
from quantline.evaluation.tasks.run import local_items
from quantline.pipeline import text_checks as checks
from quantline.pipeline.config import parse
from quantline.pipeline.text_checks import text_checks


@pytest.fixture
def own(tmp_path):
    """Writes rows to a file of one's own."""

    def write(*rows):
        path = tmp_path / "own.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return write


@pytest.fixture
def model(root):
    return root / "assets" / "demo" / "model"


def test_texts_that_the_stages_take_are_no_finding(root, composed, model):
    assert text_checks(parse(composed("method=gptq")), root, model) == []


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("calibration.n_samples=100000", "calibrate"),
        ("calibration=jsonl calibration.path={own}", "calibrate"),
        ("evaluate.path={own}", "evaluate"),
        ("evaluate.bos=add", "evaluate"),
        ("tasks.path={own}", "tasks"),
    ],
)
def test_what_a_stage_would_say_of_its_text_is_said_before_in_its_words(root, composed, own, override, stage):
    model, path = root / "assets" / "demo" / "model", own({"text": "a few words"}, {"text": ""}, {"text": "some more"})
    config = parse(composed("method=gptq", *override.format(own=path).split()))
    stages = {
        "calibrate": lambda: build(model, config.calibration, path.with_name("out")),
        "evaluate": lambda: build_windows(model, config.evaluate),
        "tasks": lambda: local_items(config.tasks, root),
    }
    with chdir(root), pytest.raises(UserError) as said:
        stages[stage]()
    (finding,) = text_checks(config, root, model)
    assert (finding.id, finding.reason, finding.refused) == ("text", str(said.value), True)


def test_the_baseline_reads_no_calibration_text_and_a_missing_text_is_told_elsewhere(root, composed, model, own):
    rounded = ["calibration.n_samples=100000", "evaluate.path=/no/such/text.jsonl"]
    assert text_checks(parse(composed("method=float", *rounded)), root, model) == []


def test_a_large_text_is_not_read_and_that_is_said(root, composed, model, own):
    path = own({"text": "broken"})
    os.truncate(path, checks.READ_UP_TO_BYTES + 1)
    (note,) = text_checks(parse(composed("method=float", f"evaluate.path={path}")), root, model)
    assert not note.refused
    assert note.reason.startswith("evaluate.path: 16.00 MiB of text are not read by plan")
