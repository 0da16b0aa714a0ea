from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from quantline.pipeline.completion import candidates, script

# Asks bash itself what it would complete a line to.
ASK = """\
source <(python -m stages.completion)
COMP_LINE="$1"; COMP_POINT=${#1}; COMP_WORDS=($1); COMPREPLY=()
_quantline 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_commands_groups_choices_and_options_are_completed(root):
    assert candidates("stages.quan", root) == ["stages.quantize"]
    assert "stages.promote" in candidates("stages.", root)
    assert candidates("stages.quantize method=gp", root) == ["method=gptq"]
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


@pytest.fixture
def console(tmp_path, root):
    """A folder for PATH with this interpreter as `python`, and the console command as an installation has it."""
    (tmp_path / "bin").mkdir()
    console = f'PYTHONPATH={root}/src exec {sys.executable} -m quantline.pipeline.console "$@"'
    for name, runs in (("python", f'exec {sys.executable} "$@"'), ("quantline", console)):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{runs}\n")
        path.chmod(0o755)
    return tmp_path / "bin"


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("python -m stages.quan", ["stages.quantize"]),
        ("python -m stages.quantize method=gp", ["gptq"]),
        ("python other.py --x", [""]),
        ("quantline quan", ["quantize"]),
        ("quantline quantize method=gp", ["gptq"]),
    ],
)
def test_bash_completes_with_the_printed_script(root, console, line, completed):
    known = {**os.environ, "PATH": f"{console}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", line], cwd=root, env=known, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == completed, done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("python -m stages.quan", "python -m stages.quantize "),
        ("python -m stages.quantize method=gp", "python -m stages.quantize method=gptq "),
        ("python -m stages.quantize calibration.n_s", "python -m stages.quantize calibration.n_samples="),
        ("quantline quan", "quantline quantize "),
    ],
)
def test_zsh_completes_with_the_printed_script(root, console, typed, completed):
    """In a terminal of its own, as a user types it."""
    lines = console / "completion.zsh"
    lines.write_text(script("zsh"))
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(root)
        os.environ.update(TERM="dumb", PATH=f"{console}:{os.environ['PATH']}")
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        # A command says that the shell is ready; what it prints is not what is typed.
        os.write(
            terminal, f"stty cols 200; autoload -U compinit; compinit -u; source {lines}; print rea''dy\r".encode()
        )
        assert shown(terminal, "ready")
        # A busy machine may lose what is typed while it draws the prompt; Ctrl-U, and it is typed again.
        for _ in range(6):
            os.write(terminal, b"\x15" + typed.encode() + b"\t")
            if shown(terminal, completed, 20):
                break
        else:
            raise AssertionError(f"{typed} is not completed to {completed}")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("python -m stages.quan", ["stages.quantize"]),
        ("python -m stages.quantize method=gp", ["method=gptq"]),
        ("python -m stages.retention ", ["apply=", "keep=", "remote="]),
        ("python other.py --x", []),
        ("quantline quan", ["quantize"]),
        ("quantline quantize calibration.n_s", ["calibration.n_samples="]),
        ("quantline ver", ["verify"]),
    ],
)
def test_fish_completes_with_the_printed_script(root, console, typed, completed):
    """Fish itself is asked; a name that ends with `=` gets no space behind it there."""
    (console / "completion.fish").write_text(script("fish"))
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {console}/completion.fish; complete -C $argv[1]", typed],
        cwd=root, env={**os.environ, "PATH": f"{console}:{os.environ['PATH']}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert sorted(done.stdout.splitlines()) == completed, done.stderr


def shown(terminal, text, seconds=60):
    """Whether the terminal shows a text, before that many seconds have passed."""
    said, end = "", time.monotonic() + seconds
    while text not in said and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            said += os.read(terminal, 65536).decode(errors="replace").replace("\a", "")  # it rings where it stops
    return text in said
