"""A small server in the place of vLLM's behind a fleet: it answers at once, and has faults on order.

Run with vLLM's own command line. `POST /control {"fault": NAME}` sets what it does wrong from now on; `GET /control` gives
its counts. What it is asked to be is the target of a load, not an engine: nothing is measured on its words.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

FAULTS = ("", "500", "429", "503", "hang", "slow", "sick", "breaks_stream", "hangs_in_stream", "full_cache", "stuck")
THINKING = float(os.environ.get("THINKING", "0.02"))
STATE = {"fault": "", "requests": 0, "aborted": 0, "running": 0, "headers": {}, "tokens": 0}
REASONS = {200: "OK", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error", 503: "Unavailable"}


def interpreter(folder: Path) -> Path:
    """An executable that takes the arguments of vLLM's Python and runs this server."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {Path(__file__).resolve()} "$@"\n')
    path.chmod(0o755)
    return path


def argument(name: str, default: str = "") -> list[str]:
    """The values of an option; the last time it is given counts."""
    if name not in sys.argv:
        return [default]
    start = len(sys.argv) - sys.argv[::-1].index(name)
    found = []
    for value in sys.argv[start:]:
        if value.startswith("--"):
            break
        found.append(value)
    return found


NAMES = argument("--served-model-name")
ROOT = argument("serve")[0]


class GoneError(Exception):
    """The client hung up."""


async def read(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, path, _ = head[0].split(" ", 2)
    headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in head[1:] if line)}
    if "chunked" in headers.get("transfer-encoding", ""):
        parts = []
        while size := int((await reader.readline()).split(b";")[0], 16):
            parts.append(await reader.readexactly(size))
            await reader.readline()
        await reader.readline()
        body = b"".join(parts)
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return method, path, headers, body


def reply(writer, value, status=200, extra=""):
    body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    kind = "text/plain" if isinstance(value, str) else "application/json"
    head = f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    writer.write(head.encode() + body)


async def connection(reader, writer):
    try:
        while True:
            await one(await read(reader), reader, writer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError, GoneError):
        pass
    finally:
        with suppress(Exception):
            writer.close()


async def one(request, reader, writer):
    method, path, headers, body = request
    fault = STATE["fault"]
    if path == "/control":
        if method == "POST":
            STATE.update(requests=0, aborted=0, **json.loads(body))
        reply(writer, STATE)
    elif path == "/v1/models":
        cards = [{"id": name, "root": ROOT, "max_model_len": 4096, "object": "model"} for name in NAMES]
        reply(writer, {"object": "list", "data": cards})
    elif path == "/health":
        reply(writer, "", 503 if fault == "sick" else 200)
    elif path == "/version":
        reply(writer, {"version": "0.32.0"})
    elif path == "/metrics":
        labels = f'{{model_name="{NAMES[0]}",engine="0"}}'
        running = 1 if fault == "stuck" else STATE["running"]
        values = {
            "vllm:num_requests_running": running, "vllm:num_requests_waiting": 0,
            "vllm:kv_cache_usage_perc": 0.97 if fault == "full_cache" else 0.01,
            "vllm:generation_tokens_total": STATE["tokens"], "vllm:prompt_tokens_total": STATE["tokens"],
        }  # fmt: skip
        reply(writer, "".join(f"{key}{labels} {value}\n" for key, value in values.items()))
    else:
        STATE["requests"] += 1
        STATE["running"] += 1
        STATE["headers"] = headers
        try:
            await answer(json.loads(body), fault, reader, writer)
        except (ConnectionError, GoneError):
            STATE["aborted"] += 1
            raise
        finally:
            STATE["running"] -= 1


async def wait(seconds, reader):
    """Wait, and notice at once when the client hangs up."""
    with suppress(asyncio.TimeoutError):
        if not await asyncio.wait_for(reader.read(1), seconds):
            raise GoneError


async def answer(request, fault, reader, writer):
    if fault in ("500", "429", "503"):
        more = "retry-after: 1\r\n" if fault == "429" else ""
        reply(writer, {"error": {"message": "on order", "code": int(fault)}}, int(fault), more)
        return
    if fault in ("hang", "stuck"):
        await wait(3600, reader)
    if request.get("model") not in NAMES:
        reply(writer, {"error": {"message": "no such model", "code": 404}}, 404)
        return
    await wait(2.0 if fault == "slow" else THINKING, reader)
    words = [NAMES[0], *(f" w{number}" for number in range(int(request.get("max_tokens") or 8)))]
    STATE["tokens"] += len(words)
    chat = "messages" in request
    usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
    shared = {"id": "c1", "created": 1, "model": NAMES[0]}
    if not request.get("stream"):
        said = "".join(words)
        inner = {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
        choice = {"index": 0, "finish_reason": "stop", **inner}
        kind = "chat.completion" if chat else "text_completion"
        reply(writer, {**shared, "object": kind, "choices": [choice], "usage": usage})
        return
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    def event(value):
        data = f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    for number, word in enumerate(words):
        if number == 4 and fault == "breaks_stream":
            writer.transport.abort()
            raise GoneError
        if number == 4 and fault == "hangs_in_stream":
            await wait(3600, reader)
        inner = {"delta": {"content": word}} if chat else {"text": word}
        last = "stop" if number == len(words) - 1 else None
        event({**shared, "object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": last, **inner}]})
        await writer.drain()
        await asyncio.sleep(0.002)
    event("[DONE]")
    writer.write(b"0\r\n\r\n")


async def main():
    host, port = argument("--host", "127.0.0.1")[0], int(argument("--port")[0])
    server = await asyncio.start_server(connection, host, port, limit=2**26, backlog=1024)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
