"""Talk to a variant in the terminal, or to several side by side.

It uses a running fleet that has the variants, or the server at `url=`, and else starts a server for each. `exit` ends it.

Examples:
    python -m stages.chat variant=awq-w4-g128
    python -m stages.chat variant=awq-w4-g128,float question="Once upon a time"
    python -m stages.chat variant=awq-w4-g128 url=http://127.0.0.1:8080
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

RUNTIMES = ("vllm", "transformers")
OPTIONS = [
    Option("variant", "NAME,NAME", "variants, MODEL@ALIAS, folders, or what the server at url= knows", required=True),
    Option("url", "http://127.0.0.1:8080", "a running server or fleet; the key is taken from QUANTLINE_KEY"),
    Option("system", "TEXT", "the system prompt"),
    Option("question", "TEXT", "ask this alone, and end"),
    Option(
        "runtime",
        "vllm",
        "transformers: five questions in a row by its own library, as JSON",
        allowed=RUNTIMES,
    ),
    Option("fuse", "true", "transformers: AutoAWQ's fused modules, on a GPU", allowed=("false", "true")),
    Option("fuse_max_seq_len", "4096", "transformers: tokens that the cache of fused modules holds", default="4096"),
    Option("attention", "sdpa", "transformers: sdpa, eager or flash_attention_2; fused modules have their own"),
    Option("out", "FILE.json", "transformers: the result; default: scratch/.ask/NAME.json"),
    Option("max_tokens", "256", "of an answer, at most", default="256"),
    Option("temperature", "0", "0 takes the likeliest token each time", default="0"),
]
READS = ("serve", "device", "toolchains", "tracking")

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from quantline.lifecycle.serve import Typed


def chat(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    import logging
    import os

    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import UserError
    from quantline.lifecycle.chat import names_of, partners
    from quantline.lifecycle.serve import Typed
    from quantline.pipeline.hydra_values import plain
    from quantline.serving.chat import Conversation, Sampling, talk

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for each request
    typed = Typed(plain(cfg), HydraConfig.get().overrides.task)
    names = names_of(arguments["variant"])
    try:
        sampling = Sampling(int(arguments["max_tokens"] or ""), float(arguments["temperature"] or ""))
    except ValueError:
        raise UserError("max_tokens and temperature: give numbers, such as max_tokens=256 temperature=0.7") from None
    if sampling.max_tokens < 1 or sampling.temperature < 0:
        raise UserError("max_tokens and temperature: give at least 1 token, and a temperature of 0 or more")
    if arguments["runtime"] == "transformers":
        own_library(names, typed, sampling.max_tokens, arguments)
        return
    with partners(ROOT, typed, names, arguments["url"], os.environ.get("QUANTLINE_KEY")) as found:
        conversations = [Conversation(partner, sampling, arguments["system"] or "") for partner in found]
        waiting = [arguments["question"]] if arguments["question"] else None

        def read() -> str:
            if waiting is None:
                return input("> ")
            if not waiting:
                raise EOFError
            return str(waiting.pop())

        if sys.stdin.isatty():
            import readline  # noqa: F401  # lets input() edit the line and bring back earlier ones
        talk(conversations, read, say)


def own_library(names: list[str], typed: Typed, most: int, arguments: dict[str, str | None]) -> None:
    from pathlib import Path

    from quantline.config.speed import QUESTIONS
    from quantline.core.errors import UserError
    from quantline.core.text import binary_size
    from quantline.evaluation.speed.own_library import ATTENTION, Asking
    from quantline.lifecycle.ask import ask
    from quantline.lifecycle.chat import subject_of_name
    from quantline.pipeline.run import StageRun

    attention, longest = arguments["attention"], str(arguments["fuse_max_seq_len"])
    if attention not in (None, *ATTENTION):
        raise UserError(f"attention={attention}: allowed are {', '.join(ATTENTION)}")
    if not longest.isdecimal() or len(names) > 1:
        raise UserError("runtime=transformers: give one variant, and a number as fuse_max_seq_len")
    questions = (arguments["question"],) if arguments["question"] else QUESTIONS
    subject = subject_of_name(ROOT, names[0], typed)
    run = StageRun("serve", subject.config, ROOT, tuple(typed.overrides))
    asking = Asking(questions, most, attention, arguments["fuse"] == "true", int(longest))
    out = Path(arguments["out"]).absolute() if arguments["out"] else None
    found, path = ask(ROOT, run, subject, asking, out)
    for answer in found["answers"]:
        say(
            f"> {answer['question']}\n{answer['answer'].strip()}\n  [{answer['tokens']} tokens, {answer['seconds']:.2f} s]\n"
        )
    say(f"memory: {binary_size(found['memory_before'])} before, {binary_size(found['memory_after'])} after; {path}\n")


def say(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    main(chat, __file__, OPTIONS, __doc__, reads=READS)
