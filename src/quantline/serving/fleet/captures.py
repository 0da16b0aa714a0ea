"""Captured requests and answers: reading them, without what the router kept of the connection, and removing old ones."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.fleet import CaptureConfig
from quantline.serving.fleet.envoy import CAPTURES


@dataclass(frozen=True)
class Capture:
    """One request and its answer.

    id: of the request. asked: the model's name in it. variant: that answered. messages: of a chat; None for a completion,
    which has a prompt. answer: the whole text. status: of the answer.
    """

    id: str
    asked: str
    variant: str
    messages: list[dict[str, Any]] | None
    prompt: str | None
    answer: str
    status: int


def remove_old(folder: Path, keep: CaptureConfig, now: float | None = None) -> int:
    """Remove captures that are older than `keep_hours`, and the oldest beyond `keep_mib`; how many were removed."""
    now = time.time() if now is None else now
    files = []
    for path in (folder / CAPTURES).glob("*.json"):
        with suppress(OSError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    files.sort(reverse=True)
    size, removed = 0, 0
    for changed, bytes_, path in files:
        size += bytes_
        if now - changed > keep.keep_hours * 3600 or size > keep.keep_mib * 2**20:
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def captures(folder: Path) -> Iterator[Capture]:
    """The captures of a fleet's folder that are whole and were answered with 200, the oldest first."""
    files = []
    for path in (folder / CAPTURES).glob("*.json"):
        with suppress(OSError):  # it was removed meanwhile
            files.append((path.stat().st_mtime_ns, path))  # their names are random numbers
    for _, path in sorted(files):
        try:
            found = read(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it is being written, or is something else than a request for text
        if found is not None and found.status == 200 and found.answer:
            yield found


def read(tapped: dict[str, Any]) -> Capture | None:
    """A capture from what the router wrote; None if it was cut off, or is no request for text."""
    trace = tapped["http_buffered_trace"]
    request, response = trace["request"], trace["response"]
    if request.get("body", {}).get("truncated") or response.get("body", {}).get("truncated"):
        return None
    headers, told = _headers(request), _headers(response)
    body = json.loads(_text(request))
    if "messages" not in body and not isinstance(body.get("prompt"), str):
        return None
    return Capture(
        told.get("x-request-id", headers.get("x-request-id", "")), str(body.get("model", "")),
        told.get("x-quantline-variant", ""), body.get("messages"), body.get("prompt"),
        _answer(_text(response)), int(told.get(":status", "0")),
    )  # fmt: skip


def _headers(part: dict[str, Any]) -> dict[str, str]:
    return {entry["key"].lower(): entry.get("value", "") for entry in part.get("headers", [])}


def _text(part: dict[str, Any]) -> str:
    return str(part.get("body", {}).get("as_string", ""))


def _answer(text: str) -> str:
    """The text of an answer, streamed or not; empty if it holds none."""
    if text.lstrip().startswith("data:"):
        lines = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
        if "[DONE]" not in lines:
            return ""
        return "".join(_said(json.loads(line), "delta") for line in lines if line != "[DONE]")
    return _said(json.loads(text), "message")


def _said(value: dict[str, Any], key: str) -> str:
    choices = value.get("choices") or []
    if not choices:
        return ""
    return str((choices[0].get(key) or {}).get("content") or choices[0].get("text") or "")
