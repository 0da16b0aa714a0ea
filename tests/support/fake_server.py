"""A small real HTTP server in the place of vLLM's: it has faults on order, and vLLM has them only by accident.

Run with vLLM's own command line. FAULT in the environment names what it does wrong; see `FAULTS`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = (
    "", "never_ready", "dies", "stubborn", "other_root", "other_name", "hangs_on_answers", "dies_on_answers",
    "streams_otherwise", "breaks_stream", "counts_wrongly", "no_counters", "refuses", "not_json", "scores_other_tokens",
)  # fmt: skip
FAULT = os.environ.get("FAULT", "")
COUNTS = {"prompt": 0, "generation": 0}
WORDS = ["one", " two", " three"]
IGNORING = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def interpreter(folder: Path) -> Path:
    """An executable that takes a Python's arguments and runs this server."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} "$@"\n')
    path.chmod(0o755)
    return path


def argument(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, value: object, status: int = 200) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            root = "/somewhere/else" if FAULT == "other_root" else argument("serve")
            cards = [{"id": "quantline", "root": root, "max_model_len": 16}]
            if FAULT == "other_name":
                cards.append({"id": "stranger", "root": root, "max_model_len": 16})
            self.reply({"data": cards})
        elif self.path == "/metrics":
            lines = [f'vllm:{what}_tokens_total{{engine="0"}} {count}.0' for what, count in COUNTS.items()]
            self.reply("" if FAULT == "no_counters" else "\n".join(lines) + "\n")
        else:
            self.reply({"version": "0.0.1"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if FAULT == "hangs_on_answers":
            time.sleep(600)
        if FAULT == "dies_on_answers":
            print("RuntimeError: out of ideas", flush=True)
            os._exit(5)
        if FAULT == "refuses":
            self.reply({"error": {"message": "not today"}}, 400)
        elif FAULT == "not_json":
            self.reply("<html>")
        elif "prompt_logprobs" in request:
            self.score(request["prompt"])
        elif "logprobs" in request:
            self.continued(request)
        else:
            self.answer(request)

    def continued(self, request: dict) -> None:
        last, count = request["prompt"][-1], request["max_tokens"] - (FAULT == "counts_wrongly")
        tokens = [f"token_id:{last + place + 1}" for place in range(count)]
        likeliest = [{token: -0.1, "token_id:0": -0.1 - place} for place, token in enumerate(tokens, start=1)]
        self.reply({"choices": [{"logprobs": {"tokens": tokens, "top_logprobs": likeliest}}]})

    def score(self, prompt: list[int]) -> None:
        echoed = [0, *prompt[1:]] if FAULT == "scores_other_tokens" else prompt
        entries = [None, *({str(token): {"logprob": -token / 10}} for token in prompt[1:])]
        self.reply({"choices": [{"prompt_token_ids": echoed, "prompt_logprobs": entries}]})

    def answer(self, request: dict) -> None:
        chat = "messages" in request
        words = WORDS[: request["max_tokens"]]
        COUNTS["prompt"] += 4
        COUNTS["generation"] += len(words) + (FAULT == "counts_wrongly")
        usage = {"prompt_tokens": 4, "completion_tokens": len(words)}
        if not request.get("stream"):
            text = "".join(words)
            choice = {"message": {"content": text}} if chat else {"text": text}
            self.reply({"choices": [{**choice, "finish_reason": "length"}], "usage": usage})
            return
        if FAULT == "streams_otherwise":
            words = [*words[:-1], " four"]
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for index, word in enumerate(words):
            choice = {"delta": {"content": word}} if chat else {"text": word}
            finish = "length" if index == len(words) - 1 else None
            self.event({"choices": [{**choice, "finish_reason": finish}]})
        self.event({"choices": [], "usage": usage})
        if FAULT != "breaks_stream":
            self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value: object) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())


def main() -> None:
    if FAULT == "dies":
        print("(Worker pid=7) ERROR 11-21 23:27:11 [a.py:1] ValueError: the weights are odd")
        print("(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(1)
    if FAULT == "never_ready":
        time.sleep(600)
    if FAULT == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # A child in a session of its own, whose parent is gone.
        inner = (
            f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {IGNORING!r}], start_new_session=True)"
        )
        subprocess.run([sys.executable, "-c", inner], check=True)
    ThreadingHTTPServer((argument("--host"), int(argument("--port"))), Handler).serve_forever()


if __name__ == "__main__":
    main()
