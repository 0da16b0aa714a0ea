"""llama.cpp's own server as a runtime, for GGUF files: how it is started, and where it differs from vLLM's.

The server is the one in xllamacpp's wheel, in a process of `toolchains.workers.llamacpp.server`. Its options have the names
of llama.cpp's program `llama-server`, so that a line that was proven here works with that program, too. It gives no
log-probabilities of a prompt (ggml-org/llama.cpp#27174): a worker scores the text by the C interface of the same library.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.core.cores import cores
from quantline.core.errors import UserError

if TYPE_CHECKING:
    from quantline.serving.server_options import ServerOptions

NAME = "llamacpp"
MODULE = "quantline.toolchains.workers.llamacpp.server"
SCORING = "quantline.toolchains.workers.llamacpp.scoring"
COUNTERS = {"prompt": "llamacpp:prompt_tokens_total", "generation": "llamacpp:tokens_predicted_total"}
NO_PROMPT_SCORES = "llama.cpp's server gives no log-probabilities of a prompt, which tasks are scored by"


def file_of(folder: Path) -> Path:
    """The GGUF file of a checkpoint.

    Raises:
        UserError: there is none, or several.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{folder}: has {len(files)} GGUF files; llama.cpp serves a folder with one")
    return files[0]


def command_line(python: Path, model: Path, options: ServerOptions, port: int) -> list[str]:
    """The arguments that start the server."""
    return [
        str(python), "-m", MODULE, "--model", str(file_of(model)), "--alias", options.name,
        "--host", options.process.host, "--port", str(port), *flags_of(options),
    ]  # fmt: skip


def line(model: str, options: ServerOptions) -> str:
    """The line of a shell that serves a checkpoint by llama.cpp's own program."""
    return shlex.join(["llama-server", "--model", f"{model}/model.gguf", *flags_of(options)])


def flags_of(options: ServerOptions) -> list[str]:
    """The arguments that decide what is served and how, the same for every address and name."""
    if options.proven is not None:
        return list(options.proven)
    at_once = options.process.max_num_seqs or options.process.concurrency
    # Its threads wait for each other by spinning: as many as there are cores, they take minutes where one takes seconds.
    threads = options.threads or max(1, cores() - 1)
    flags = ["--parallel", str(at_once), "--threads", str(threads), "--no-cache-prompt"]
    if options.max_model_len is not None:  # shared by all sequences
        flags += ["--ctx-size", str(options.max_model_len * at_once)]
    return [*flags, *options.process.extra_args]


def longest(card: dict[str, Any]) -> int:
    """The longest sequence that it takes, by its entry in /v1/models."""
    return int(card["meta"]["n_ctx"])
