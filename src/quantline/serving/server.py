"""An OpenAI-compatible inference server that runs during a `with` block and leaves no process behind.

    with serve(toolchain.python, folder, ServerOptions(config.serve.process, max_model_len=513), log=log) as server:
        server.client().get("/v1/models")

vLLM runs as several processes that rename themselves, so neither their command line nor their environment tells which
server they belong to. `process_tree.py` therefore supervises the whole tree and ends it when this process ends, however
that happens. With `keeping` the server of a stage before is taken over, and handed on to a stage after: see
`quantline.serving.keeping`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import httpx

from quantline.core.errors import ServerError, UserError
from quantline.core.progress import bar
from quantline.serving.command import ServerOptions, command_line, environment_of
from quantline.serving.handover import hand_on, known, make_room, taken_over
from quantline.serving.keeping import Keeping
from quantline.serving.ports import free_port, require_free
from quantline.serving.running import GRACE_SECONDS, Server, end, longest_sequence, tell
from quantline.serving.server_log import ending, failure_reason
from quantline.toolchains.protocol import JobResult
from quantline.toolchains.toolchain import worker_environment


class Vllm(NamedTuple):
    """What serves, vLLM or llama.cpp: its interpreter, its version, and how its server is shared; None for not at all.

    run_worker: runs a worker's job, (toolchain, module, job, label) -> its result; for servers that do not score prompts.
    """

    python: Path
    version: str
    keeping: Keeping | None = None
    run_worker: Callable[[str, str, dict[str, Any], str], JobResult] | None = None


@contextmanager
def serve(
    python: Path, model: Path, options: ServerOptions, *, log: Path, keeping: Keeping | None = None
) -> Iterator[Server]:
    """Serve the checkpoint in `model` with the server of the interpreter `python`, see `ServerOptions.runtime`.

    log: gets everything the server prints; overwritten. keeping: how it is shared with other stages; None for not at all.

    Raises:
        UserError: the folder is not a checkpoint, or the port is taken.
        ServerError: the server died while loading or was not ready in time.
    """
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: has no config.json; give the folder of a checkpoint")
    variables = worker_environment(options.threads or 1, {**environment_of(options), **options.environment})
    noted = known(python, model, options, variables, keeping) if keeping is not None else {}
    server = taken_over(model, options, keeping, noted) if keeping is not None and not keeping.fresh else None
    if server is None:
        if keeping is not None:
            make_room(keeping, model, options)
        owner = keeping.owner if keeping is not None else 0
        server = _started(python, model, options, variables=variables, log=log, owner=owner)
    handed_on = False
    try:
        if not server.taken_over:
            server.load_memory_bytes = server.peak_memory_bytes()
        yield server
        handed_on = keeping is not None and keeping.onward and hand_on(server, noted, keeping)
    finally:
        if not handed_on:
            end(server)


def _started(
    python: Path,
    model: Path,
    options: ServerOptions,
    *,
    variables: Mapping[str, str],
    log: Path,
    owner: int,
) -> Server:
    host = options.process.host
    port = options.process.port if options.process.port is not None else free_port(host)
    require_free(host, port, "set serve.process.port=null")
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as sink:
        command = command_line(python, model, options, port)
        process = _supervised(command, variables, sink, owner)
    server = Server(model, options, port, log, process)
    try:
        _wait_until_ready(server, started)
        tell(process, b"+")
        server.processes()
    except BaseException:
        end(server)
        raise
    return server


def run_vllm(python: Path, arguments: Sequence[str], options: ServerOptions, *, log: Path) -> None:
    """Run a vLLM command that loads a model itself, and wait for its end. `arguments` are those after `vllm`.

    log: gets everything that the command prints; overwritten.

    Raises:
        ServerError: it failed; the message gives the reason from its log.
    """
    variables = worker_environment(options.threads or 1, {**environment_of(options), **options.environment})
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        process = _supervised([str(python), "-m", "vllm.entrypoints.cli.main", *arguments], variables, sink)
    running = Server(log.parent, options, 0, log, process)
    try:
        code = process.wait()
    finally:
        end(running)
    if code != 0:
        raise ServerError(f"vllm {' '.join(arguments[:2])} {ending(code)}: {failure_reason(log)}; log: {log}")


def _supervised(
    command: Sequence[str], variables: Mapping[str, str], sink: IO[bytes], owner: int = 0
) -> subprocess.Popen[bytes]:
    supervisor = [sys.executable, "-I", "-S", str(Path(__file__).with_name("process_tree.py"))]
    return subprocess.Popen(
        [*supervisor, f"{GRACE_SECONDS}:{owner}", *command],
        env=variables, stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def _wait_until_ready(server: Server, started: float) -> None:
    limit = server.options.process.startup_timeout_seconds
    where = f"{server.model.name} on {server.options.process.host}:{server.port}"
    say = _Milestones(f"serving {where}; log: {server.log}")
    with server.client(timeout_seconds=2.0) as client, bar(f"loading {where}", milestones=False) as progress:
        while True:
            elapsed = time.monotonic() - started
            server.require_alive(f"loading {server.model}")
            try:
                if client.get("/health").status_code == httpx.codes.OK:
                    break
            except httpx.HTTPError:
                pass
            if elapsed > limit:
                raise ServerError(
                    f"the server of {server.model} was not ready after {limit:.0f} s; raise "
                    f"serve.process.startup_timeout_seconds, or see its log: {server.log}"
                )
            progress.update(min(elapsed, limit), limit, "seconds")
            say.waited(elapsed, limit)
            time.sleep(min(0.25, max(limit - elapsed, 0.01)))
        server.max_model_len = longest_sequence(server, client)
        server.load_seconds = time.monotonic() - started
        progress.update(limit, limit, f"ready after {server.load_seconds:.0f} s")
    say(f"ready after {server.load_seconds:.0f} s")


class _Milestones:
    """Progress lines for logs, where no progress bar is shown."""

    def __init__(self, first: str) -> None:
        self._next = 30.0
        self(first)

    def __call__(self, line: str) -> None:
        if not sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)

    def waited(self, elapsed: float, limit: float) -> None:
        if elapsed >= self._next:
            self._next += 30.0
            self(f"still loading: {elapsed:.0f} s of at most {limit:.0f} s")
