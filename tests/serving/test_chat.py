from __future__ import annotations

import json
import subprocess

import fake_openai
import httpx
import pytest

from quantline.core.errors import ServerError
from quantline.serving.chat import HELP, Conversation, Partner, Said, Sampling, side_by_side, talk
from quantline.serving.fleet.child import wait_until
from quantline.serving.ports import free_port


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server that answers with its own name, and its URL."""
    port = free_port("127.0.0.1")
    command = [str(fake_openai.interpreter(tmp_path_factory.mktemp("fake"))), "serve", "m", "--served-model-name", "w4"]
    with subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)]) as process:
        url = f"http://127.0.0.1:{port}"

        def is_up():
            try:
                return httpx.get(f"{url}/health", trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        assert wait_until(is_up, 10)
        yield url
        process.kill()


def conversation(url, **given):
    return Conversation(Partner("w4", url, "w4"), Sampling(max_tokens=3), **given)


def spoken(lines):
    """A reader of these lines, and a list that gets what is written."""
    waiting, written = iter(lines), []

    def read():
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read, written


def test_an_answer_streams_and_the_history_goes_with_the_next_question(served):
    one = conversation(served, system="Be short.")
    pieces = []
    said = one.ask("What is an index?", pieces.append)
    assert (said.text, "".join(pieces), len(pieces)) == ("w4 w0 w1 w2", said.text, 4)
    assert 0 < said.first_seconds < said.seconds
    one.ask("And a table?")
    assert [message["role"] for message in one._history("Third?")] == [
        "system", "user", "assistant", "user", "assistant", "user"
    ]  # fmt: skip


def test_exit_ends_it_and_reset_forgets(served):
    one = conversation(served)
    read, written = spoken(["first", "", "/reset", "second", "EXIT", "third"])
    assert talk([one], read, written.append) == 2
    assert [message["content"] for message in one.messages if message["role"] == "user"] == ["second"]
    assert written[0] == f"{HELP}\n"
    read, written = spoken(["/system Be short.", "first"])
    assert talk([one], read, written.append) == 1
    assert one.system == "Be short."


@pytest.mark.parametrize("fault", ["500", "breaks_stream"])
def test_an_answer_that_fails_is_told_and_the_conversation_goes_on_without_it(served, fault):
    one = Conversation(Partner("w4", served, "w4"), Sampling(max_tokens=8))
    httpx.post(f"{served}/control", json={"fault": fault}, trust_env=False)
    read, written = spoken(["first", "exit"])
    talk([one], read, written.append)
    httpx.post(f"{served}/control", json={"fault": ""}, trust_env=False)
    assert "error: w4: " in "".join(written)
    assert one.messages == []
    with pytest.raises(ServerError, match="404: no such model"):
        Conversation(Partner("x", served, "x"), Sampling()).ask("hello")


def test_several_are_asked_the_same_and_stand_side_by_side_or_below_each_other(served):
    both = [conversation(served), Conversation(Partner("other", served, "w4"), Sampling(max_tokens=2))]
    read, written = spoken(["hello"])
    talk(both, read, written.append, width=100)
    lines = "".join(written).splitlines()
    assert any(line.startswith("w4 w0 w1 w2") and line.endswith("| w4 w0 w1") for line in lines)
    narrow = side_by_side([Said("one two", "a"), Said("three", "b")], 60)
    assert narrow.splitlines()[1::2] == ["one two", "three"]


def test_long_answers_are_wrapped_in_their_columns():
    told = side_by_side([Said("word " * 40, "a"), Said("x\n\ny", "b")], 90)
    assert max(map(len, told.splitlines())) <= 90
    assert json.dumps(told).count("word") == 40
