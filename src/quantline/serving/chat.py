"""A conversation with served models in a terminal: one that streams, or several side by side on the same questions."""

from __future__ import annotations

import json
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import httpx

from quantline.core.errors import ServerError

ENDS = ("exit", "quit")
HELP = "exit ends it, /reset forgets what was said, /system TEXT sets the system prompt"
# Narrower columns are hard to read; the answers then stand below each other.
NARROWEST = 36


@dataclass(frozen=True)
class Partner:
    """A model that is asked. name: as it is shown; model: as requests name it; headers: of the requests."""

    name: str
    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature: 0 takes the likeliest token each time."""

    max_tokens: int = 256
    temperature: float = 0.0
    timeout_seconds: float = 300.0


@dataclass
class Said:
    """One answer: its text, who gave it, tokens if they were counted, and seconds until the first and the last of it."""

    text: str = ""
    variant: str = ""
    tokens: int | None = None
    first_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def told(self) -> str:
        """A line about it."""
        speed = f", {self.tokens / self.seconds:.1f} tokens/s" if self.tokens and self.seconds else ""
        return f"{self.variant}: first token after {self.first_seconds:.2f} s{speed}"


@dataclass
class Conversation:
    """What was said so far with one partner."""

    partner: Partner
    sampling: Sampling
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    _plain: bool = False  # the model has no chat template, so it goes on with the text

    def reset(self) -> None:
        """Forget what was said."""
        self.messages.clear()

    def ask(self, question: str, hear: Callable[[str], None] = lambda piece: None) -> Said:
        """Ask, and keep question and answer. hear: gets each piece of the answer as it comes.

        Raises:
            ServerError: no answer, or one that broke off; the conversation is then as before.
        """
        said = Said(variant=self.partner.name)
        started = time.monotonic()
        try:
            for piece in self._pieces(question, said):
                said.first_seconds = said.first_seconds or time.monotonic() - started
                said.text += piece
                hear(piece)
        except httpx.HTTPError as error:
            raise ServerError(f"{self.partner.name}: the answer broke off ({type(error).__name__}: {error})") from error
        said.seconds = time.monotonic() - started
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said.text}]
        return said

    def _pieces(self, question: str, said: Said) -> Iterator[str]:
        if not self._plain:
            try:
                yield from self._stream("chat/completions", {"messages": self._history(question)}, said)
                return
            except _NoTemplateError:
                self._plain = True
        said.text = ""
        before = "\n".join(message["content"] for message in self._history(question))
        yield from self._stream("completions", {"prompt": before}, said)

    def _history(self, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages, {"role": "user", "content": question}]

    def _stream(self, path: str, asked: Mapping[str, Any], said: Said) -> Iterator[str]:
        sampling = self.sampling
        body = {
            "model": self.partner.model, **asked, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        with (
            httpx.Client(timeout=sampling.timeout_seconds, trust_env=False) as client,
            client.stream(
                "POST", f"{self.partner.url}/v1/{path}", json=body, headers=dict(self.partner.headers)
            ) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                text = answer.read().decode(errors="replace")
                if "chat template" in text:
                    raise _NoTemplateError
                raise ServerError(f"{self.partner.name}: {answer.status_code}: {_message(text)}")
            said.variant = answer.headers.get("x-quantline-variant", self.partner.name)
            is_whole = False
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    is_whole = True
                    break
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(f"{self.partner.name}: {_message(data)}")
                if event.get("usage"):
                    said.tokens = int(event["usage"]["completion_tokens"])
                for choice in event.get("choices") or []:
                    piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    if piece:
                        yield piece
            if not is_whole:
                raise ServerError(f"{self.partner.name}: the answer ended without its end")


class _NoTemplateError(Exception):
    """The model has no chat template."""


def _message(text: str) -> str:
    try:
        value = json.loads(text)
        return str(value["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]


def talk(
    conversations: list[Conversation], read: Callable[[], str], write: Callable[[str], None], width: int | None = None
) -> int:
    """Ask what is read until one of `ENDS` or the end of the input; the number of questions.

    Args:
        conversations: one streams its answer; several are asked at once and shown side by side.
        read: gives a line; raises EOFError at the end.
        write: gets text, with its line ends.
        width: of the terminal; None asks it.
    """
    write(f"{HELP}\n")
    count = 0
    while True:
        try:
            line = read().strip()
        except EOFError:
            return count
        if line.lower() in ENDS:
            return count
        if not line:
            continue
        if line == "/reset" or line.startswith("/system"):
            for conversation in conversations:
                conversation.reset()
                if line.startswith("/system"):
                    conversation.system = line.removeprefix("/system").strip()
            continue
        count += 1
        try:
            if len(conversations) == 1:
                said = conversations[0].ask(line, write)
                write(f"\n  [{said.told}]\n")
            else:
                with ThreadPoolExecutor(len(conversations)) as pool:
                    answers = list(pool.map(lambda one, line=line: one.ask(line), conversations))
                write(side_by_side(answers, width or shutil.get_terminal_size().columns))
        except ServerError as error:
            write(f"\nerror: {error}\n")


def side_by_side(answers: list[Said], width: int) -> str:
    """Answers in columns, or below each other where columns would be too narrow."""
    column = (width - 3 * (len(answers) - 1)) // len(answers)
    if column < NARROWEST:
        return "".join(f"--- {said.told}\n{said.text.strip()}\n" for said in answers)

    def wrapped(text: str) -> list[str]:
        return [part for line in text.strip().splitlines() for part in textwrap.wrap(line, column) or [""]]

    heads = [wrapped(said.told) for said in answers]
    bodies = [wrapped(said.text) for said in answers]
    lines = [*zip_longest(*heads, fillvalue=""), ["-" * column] * len(answers), *zip_longest(*bodies, fillvalue="")]
    return "".join(" | ".join(f"{part:<{column}}" for part in line).rstrip() + "\n" for line in lines)
