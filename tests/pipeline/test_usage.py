from __future__ import annotations

import subprocess
import sys

import pytest

from quantline.pipeline.command_line import Option
from quantline.pipeline.stages import STAGES
from quantline.pipeline.usage import usage

OWN = (Option("to", "DIR", "where"), Option("keep", "workspace", "what", allowed=("workspace", "tags")))


def test_a_commands_own_options_come_with_their_values(root):
    text = usage("COMMAND", "\nAbout.\n", OWN, reads=None, conf=root / "conf")
    lines = text.splitlines()
    assert lines[:3] == ["About.", "", "usage: COMMAND [NAME=VALUE ...]"]
    assert [line.split() for line in lines[4:]] == [
        ["Options", "of", "this", "command:"], ["to=DIR", "where"],
        ["keep=workspace", "what", "(workspace,", "or", "tags)"],
    ]  # fmt: skip


def test_the_options_that_a_stage_reads_come_with_their_defaults_and_texts(root):
    text = usage("COMMAND", "About.", (), reads=["method", "bits"], conf=root / "conf")
    assert "  method=awq                              or autoround, bnb, float, " in text
    assert "  method.zero_point=true" in text
    assert "  bits=4                                  width of a quantized weight\n" in text
    assert "  group_size=" not in text
    assert "calibration=demo" in text[text.index("Further groups") :]


def test_the_choices_on_the_command_line_decide_whose_options_are_shown(root):
    text = usage("C", "", (), reads=["method"], conf=root / "conf", arguments=["method=gptq", "--help"])
    assert "  method.desc_act=false" in text
    assert "method.zero_point" not in text
    assert "method=awq" in usage("C", "", (), reads=["method"], conf=root / "conf", arguments=["method=none"])


def test_a_part_of_a_section_is_shown_alone(root):
    text = usage("C", "", (), reads=["serve.runtime", "serve.smoke"], conf=root / "conf")
    assert "  serve.runtime=" in text
    assert "  serve.smoke.max_tokens=" in text
    assert "serve.process" not in text


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_shows_what_it_reads_within_110_columns(root, stage):
    reads = [key for key in STAGES[stage].reads if not key.startswith("frozen.")]
    text = usage("C", "", (), reads=reads, conf=root / "conf")
    assert max(map(len, text.splitlines())) <= 110
    assert all(f"  {key}" in text for key in reads)


def test_help_that_is_cut_off_by_a_pipe_ends_quietly(root):
    command = f"{sys.executable} -m stages.evaluate --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Score the variant")
    assert done.stderr == ""


def test_examples_are_shown_as_they_are_typed(root):
    about = "About.\n\nExamples:\n    python -m stages.plan bits=8\n"
    assert "    quantline plan bits=8\n" in usage("quantline plan", about, (), reads=None, conf=root / "conf")
    assert "    python -m stages.plan bits=8\n" in usage(
        "python -m stages.plan", about, (), reads=None, conf=root / "conf"
    )
