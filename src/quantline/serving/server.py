"""An OpenAI-compatible inference server that runs during a `with` block and leaves no process behind.

    with serve(toolchain.python, folder, ServerOptions(config.serve.process, max_model_len=513), log=log) as server:
        server.client().get("/v1/models")

vLLM runs as several processes that rename themselves, so neither their command line nor their environment tells which
server they belong to. `process_tree.py` therefore supervises the whole tree and ends it when this process ends, however
that happens.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import httpx
import psutil

from quantline.core.errors import ServerError, UserError
from quantline.core.progress import bar
from quantline.serving.command import ServerOptions, command_line, environment_of
from quantline.serving.ports import free_port, require_free
from quantline.serving.server_log import ending, failure_reason
from quantline.toolchains.toolchain import worker_environment

# vLLM was seen to take 2 s to shut down.
GRACE_SECONDS = 10.0


class Vllm(NamedTuple):
    """The vLLM that serves: its interpreter, and its version."""

    python: Path
    version: str


@dataclass
class Server:
    """A server that is ready. `load_seconds` is the time from its start until it was ready."""

    model: Path
    options: ServerOptions
    port: int
    log: Path
    process: subprocess.Popen[bytes]
    load_seconds: float = 0.0
    max_model_len: int = 0
    seen: set[psutil.Process] = field(default_factory=set, repr=False)

    @property
    def url(self) -> str:
        """The server's base URL."""
        host = self.options.process.host
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (read, not bound)
        return f"http://[{address}]:{self.port}" if ":" in address else f"http://{address}:{self.port}"

    def client(self, timeout_seconds: float = 60.0, connections: int = 8) -> httpx.Client:
        """An HTTP client for the server. It ignores proxies from the environment."""
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.Client(base_url=self.url, timeout=timeout_seconds, limits=limits, trust_env=False)

    def processes(self) -> list[psutil.Process]:
        """The server's running processes, without the supervisor."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.seen.update(found)
        return found

    def memory_bytes(self) -> int:
        """Resident memory of all its processes; shared pages count once per process."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def peak_memory_bytes(self) -> int:
        """The peaks of resident memory of its running processes, summed.

        The kernel records the peaks, loading included. The sum is an upper bound: the peaks need not coincide, and shared
        pages count once per process.
        """
        total = 0
        for process in self.processes():
            with suppress(OSError):  # it ended meanwhile
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
                total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
        return total

    def require_alive(self, doing: str) -> None:
        """Check that the server still runs.

        Raises:
            ServerError: it ended; the message gives the reason from its log.
        """
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"the server {ending(code)} while {doing}: {failure_reason(self.log)}; log: {self.log}")

    def failure(self, error: httpx.HTTPError, doing: str) -> ServerError:
        """The error to raise for a request that failed in transport; if the server ended, it says so."""
        try:
            path = error.request.url.path
        except RuntimeError:
            path = "a request"
        if isinstance(error, httpx.TimeoutException):
            return ServerError(f"the server did not answer {path} in time while {doing}; log: {self.log}")
        # The connections close before the last process has ended.
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(3.0)
        try:
            self.require_alive(doing)
        except ServerError as ended:
            return ended
        return ServerError(f"the server closed the connection of {path} while {doing}: {error!r}; log: {self.log}")

    def log_text(self) -> str:
        """What it has logged so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def serve(python: Path, model: Path, options: ServerOptions, *, log: Path) -> Iterator[Server]:
    """Serve the checkpoint in `model` with the vLLM of the interpreter `python`.

    log: gets everything the server prints; overwritten.

    Raises:
        UserError: the folder is not a checkpoint, or the port is taken.
        ServerError: the server died while loading or was not ready in time.
    """
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: has no config.json; give the folder of a checkpoint")
    host = options.process.host
    port = options.process.port if options.process.port is not None else free_port(host)
    require_free(host, port)
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = worker_environment(options.threads or 1, {**environment_of(options), **options.environment})
    started = time.monotonic()
    with log.open("wb") as sink:
        process = _supervised(command_line(python, model, options, port), variables, sink)
    server = Server(model, options, port, log, process)
    try:
        _wait_until_ready(server, started)
        _tell_up(process)
        server.processes()
        yield server
    finally:
        end(server)


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


def _supervised(command: Sequence[str], variables: Mapping[str, str], sink: IO[bytes]) -> subprocess.Popen[bytes]:
    supervisor = [sys.executable, "-I", "-S", str(Path(__file__).with_name("process_tree.py")), str(GRACE_SECONDS)]
    return subprocess.Popen(
        [*supervisor, *command],
        env=variables, stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def _tell_up(process: subprocess.Popen[bytes]) -> None:
    """Tell the supervisor that the server is ready: from now on the server gets time to shut down by itself."""
    if process.stdin is not None:
        process.stdin.write(b"+")
        process.stdin.flush()


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
        server.max_model_len = _max_model_len(server, client)
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


def _max_model_len(server: Server, client: httpx.Client) -> int:
    """The longest sequence that the server takes. Checks first that the port is not another server's."""
    try:
        models = client.get("/v1/models").raise_for_status().json()["data"]
        card = next(card for card in models if card["id"] == server.options.name)
        root, length = str(card["root"]), int(card["max_model_len"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ServerError(
            f"port {server.port} is healthy but does not list {server.options.name}: {error!r}"
        ) from error
    if root != str(server.model):
        raise ServerError(f"port {server.port} belongs to another server, of {root}; set serve.process.port=null")
    return length


def end(server: Server) -> None:
    """End the server and all its processes; return when they have ended."""
    server.processes()
    try:
        if server.process.stdin is not None:
            server.process.stdin.close()
        # A fork of this process may hold the pipe open, so the supervisor gets a signal as well.
        server.process.terminate()
        server.process.wait(GRACE_SECONDS + 10)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Processes are left only if the supervisor itself was killed or hangs.
        server.processes()
        for process in server.seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(server.seen, timeout=5)
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
