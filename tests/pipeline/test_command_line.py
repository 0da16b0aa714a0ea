from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from quantline.core.errors import UserError
from quantline.pipeline.command_line import Option, ending, help_asked, read

TO, KEEP = (
    Option("to", "DIR", "where", required=True),
    Option("keep", "workspace", "what", allowed=("workspace", "tags")),
)
PORT = Option("port", "PORT", "a port", default="5000", bare=True)
WITH_OPTIONS = (
    "backup", "demote", "fetch", "lineage", "plan", "promote", "rebuild", "restore", "retention", "serve", "ui",
)  # fmt: skip


def test_help_of_everything_is_not_the_help_of_the_command():
    assert help_asked(["bits=8", "--help"])
    assert help_asked(["-h"])
    assert not help_asked(["--help=all"])


def test_given_values_replace_defaults():
    assert read(["to=a=b"], [TO, KEEP], configured=False) == ({"to": "a=b", "keep": "workspace"}, [])
    assert read(["to=x", "keep=tags"], [TO, KEEP], configured=False)[0] == {"to": "x", "keep": "tags"}


def test_remaining_arguments_go_to_the_configuration():
    own, rest = read(["bits=8", "to=x", "-cn", "awq"], [TO], configured=True)
    assert (own, rest) == ({"to": "x"}, ["bits=8", "-cn", "awq"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["kep=tags"], r"kep=tags: no such option \(did you mean keep\?\); give NAME=VALUE of to=DIR, keep=workspace"),
        (["keep"], "keep: no such option"),
        (["--dry"], "--dry: no such option"),
        (["to=a", "to=b"], "to=b: give to=VALUE, once"),
        (["to="], "to=: give to=VALUE, once"),
        (["to=a", "keep=all"], "keep=all: allowed are workspace, tags"),
        (["keep=tags"], "to: is not set; give to=DIR"),
    ],
)
def test_a_wrong_option_is_refused_with_the_allowed_ones(given, said):
    with pytest.raises(UserError, match=said):
        read(given, [TO, KEEP], configured=False)


def test_one_option_may_be_given_by_its_value_alone():
    assert read([], [PORT], configured=False)[0] == {"port": "5000"}
    assert read(["5001"], [PORT], configured=False)[0] == read(["port=5001"], [PORT], configured=False)[0]
    with pytest.raises(UserError, match="5002: give port=VALUE, once"):
        read(["5001", "5002"], [PORT], configured=False)
    with pytest.raises(UserError, match="this command has no options"):
        read(["5001"], [], configured=False)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing half written was left\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied; make it writable\n"),
        (
            NotADirectoryError(20, "Not a directory", "/x"),
            1,
            "error: /x: Not a directory; check the path",
        ),
        (ValueError("ours"), 70, "Traceback"),
    ],
)
def test_an_error_becomes_a_message_and_an_exit_code(root, capsys, error, code, said):
    with pytest.raises(SystemExit) as ended, ending(root / "conf"):
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_every_command_with_options_of_its_own_declares_them(name):
    assert all(option.about for option in importlib.import_module(f"stages.{name}").OPTIONS)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["backup", "--help"], 0, "usage: python -m stages.backup [NAME=VALUE ...]"),
        (["promote", "--help"], 0, "Options of this command:\n  variant=NAME"),
        (["promote", "--help"], 0, "  tracking.uri=null"),
        (["promote", "--help=all"], 0, "Groups of options"),
        (["backup", "--version"], 0, "quantline 0."),
        (["promote", "--version"], 0, "quantline 0."),
        (["backup"], 2, "error: to: is not set; give to=DIR\n"),
        (["promote", "variant=awq-w4-g128"], 2, "error: alias: is not set; give variant=NAME alias=NAME\n"),
        (
            ["rebuild", "run=1234", "out=x", "until=quantise"],
            2,
            "error: until=quantise: allowed are evaluate, serve_smoke",
        ),
        (["retention", "apply=yes"], 2, "error: apply=yes: allowed are false, true\n"),
        (["ui", "http"], 2, "error: http: is not a port; give a number from 1 to 65535\n"),
    ],
)
def test_commands_print_their_help_and_refuse_unknown_options(root, command, code, said):
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{command[0]}", *command[1:]],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr


@pytest.mark.e2e
def test_output_that_is_cut_off_by_a_pipe_is_no_error(root):
    command = f"{sys.executable} -m stages.plan json=true method=gptq | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr
