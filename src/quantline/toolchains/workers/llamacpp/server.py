"""llama.cpp's OpenAI-compatible server, as xllamacpp 2026.10.11549 has it in a library, in a process of its own.

    python -m quantline.toolchains.workers.llamacpp.server --model FILE --alias NAME --host H --port P --ctx-size N ...

The options are those of `llama-server`. Off are what it has besides: its web page, tools, the listing of prompts that it
works on, and caches that make an answer depend on those before it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; ends the process with a message where one is not known."""
    parser = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-cache-prompt", action="store_true")
    return parser.parse_args(arguments)


def parameters(options: argparse.Namespace) -> Any:
    """The library's parameters."""
    import xllamacpp  # type: ignore[import-not-found]

    found = xllamacpp.CommonParams()
    found.model.path = options.model
    found.model_alias = {options.alias}
    found.hostnames, found.port = [options.host], options.port
    found.n_ctx, found.n_parallel = options.ctx_size, options.parallel
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = options.threads
    found.cache_prompt, found.cache_ram_mib, found.cache_idle_slots = not options.no_cache_prompt, 0, False
    found.endpoint_metrics, found.endpoint_slots, found.endpoint_props, found.ui = True, False, False, False
    found.n_gpu_layers = 0
    return found


def main(arguments: Sequence[str]) -> None:
    """Serve until a signal ends the process."""
    import xllamacpp

    server = xllamacpp.Server(parameters(options_of(arguments)))
    print(f"llama.cpp serves at {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main(sys.argv[1:])
