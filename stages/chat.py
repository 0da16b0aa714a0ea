"""Talk to a variant in the terminal: `python -m stages.chat variant=awq-w4-g128`, or to several side by side: `variant=a,b`.

It uses a running fleet that has the variants, or the server at `url=`, and else starts a server for each. `exit` ends it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("variant", "NAME,NAME", "variants, MODEL@ALIAS, folders, or what the server at url= knows", required=True),
    Option("url", "http://127.0.0.1:8080", "a running server or fleet; the key is taken from QUANTLINE_KEY"),
    Option("system", "TEXT", "the system prompt"),
    Option("question", "TEXT", "ask this alone, and end"),
    Option("max_tokens", "256", "of an answer, at most", default="256"),
    Option("temperature", "0", "0 takes the likeliest token each time", default="0"),
]
READS = ("serve", "device", "toolchains", "tracking")

if TYPE_CHECKING:
    from omegaconf import DictConfig


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


def say(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    main(chat, __file__, OPTIONS, __doc__, reads=READS)
