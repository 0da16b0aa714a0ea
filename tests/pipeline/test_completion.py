from __future__ import annotations

import subprocess
import sys

import pytest

from quantline.pipeline.completion import candidates

# Asks bash itself what it would complete a line to.
ASK = """\
source <("$1" -m stages.completion)
COMP_LINE="$2"; COMP_POINT=${#2}; COMP_WORDS=("$1" $2); COMPREPLY=()
_quantline 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_commands_groups_choices_and_options_are_completed(root):
    assert candidates("stages.quan", root) == ["stages.quantize"]
    assert "stages.promote" in candidates("stages.", root)
    assert candidates("stages.quantize method=g", root) == ["method=gptq"]
    assert candidates("stages.quantize bit", root) == ["bits="]
    assert candidates("stages.quantize method=gptq method.desc", root) == ["method.desc_act="]
    assert candidates("stages.quantize method=gptq method.sym=", root) == ["method.sym=true", "method.sym=false"]


def test_options_of_another_choice_are_not_offered(root):
    assert candidates("stages.quantize method.desc", root) == []
    assert candidates("stages.quantize method=gptq meth", root)[0] == "method.damp_percent="


def test_a_commands_own_options_come_first_and_alone_where_it_has_no_configuration(root):
    assert candidates("stages.retention ", root) == ["keep=", "remote=", "apply="]
    assert candidates("stages.retention apply=", root) == ["apply=false", "apply=true"]
    assert candidates("stages.rebuild ", root)[:2] == ["run=", "out="]
    assert "tracking=" in candidates("stages.rebuild ", root)
    assert candidates("stages.run until=ev", root) == ["until=evaluate"]


def test_what_does_not_exist_has_no_completions(root):
    assert candidates("stages.nothing ", root) == []
    assert candidates("stages.quantize method=nothing method.x", root) == []


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("python -m stages.quan", ["stages.quantize"]),
        ("python -m stages.quantize method=gp", ["gptq"]),
        ("python other.py --x", [""]),
    ],
)
def test_bash_completes_with_the_printed_script(root, line, completed):
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", sys.executable, line], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == completed, done.stderr
