from __future__ import annotations

import sys

import pytest

from quantline.core.errors import UserError
from quantline.pipeline.command_line import is_true, read_words, run_words


def test_words_come_over_their_defaults():
    assert read_words(["to=a=b"], {"to": None, "keep": "workspace"}) == {"to": "a=b", "keep": "workspace"}


@pytest.mark.parametrize("word", ["kep=tags", "keep", "--dry"])
def test_a_word_that_is_none_is_refused_with_those_that_are(word):
    with pytest.raises(UserError, match=r"is no option.*give KEY=VALUE of to=\.\.\., keep=workspace"):
        read_words([word], {"to": None, "keep": "workspace"})


def test_true_and_false_are_the_only_ones():
    assert (is_true("apply", "true"), is_true("apply", "false")) == (True, False)
    with pytest.raises(UserError, match="apply=yes: give true or false"):
        is_true("apply", "yes")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing half written was left\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
    ],
)
def test_what_goes_wrong_is_a_message_and_an_exit_code(monkeypatch, capsys, error, code, said):
    monkeypatch.setattr(sys, "argv", ["stage"])

    def work(_words):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_words(work, "About.", {})
    assert ended.value.code == code
    assert capsys.readouterr().err == said


def test_help_is_printed_and_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage", "--help"])
    with pytest.raises(SystemExit) as ended:
        run_words(lambda _words: pytest.fail("it ran"), "\nAbout.\n", {})
    assert not ended.value.code
    assert capsys.readouterr().out == "About.\n"
