"""A server that runs: its address, its processes and their memory, and how it ends."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from quantline.core.errors import ServerError
from quantline.serving import llamacpp
from quantline.serving.command import ServerOptions
from quantline.serving.keeping import Adopted
from quantline.serving.server_log import ending, failure_reason

# vLLM was seen to take 2 s to shut down.
GRACE_SECONDS = 10.0

Supervisor = subprocess.Popen[bytes] | Adopted


@dataclass
class Server:
    """A server that is ready.

    load_seconds: from its start until it was ready. log: of everything since then. taken_over: the stage that started it;
    empty if this one did. load_memory_bytes: the peak of its memory until it was ready.
    """

    model: Path
    options: ServerOptions
    port: int
    log: Path
    process: Supervisor
    load_seconds: float = 0.0
    max_model_len: int = 0
    seen: set[psutil.Process] = field(default_factory=set, repr=False)
    taken_over: str = ""
    load_memory_bytes: int = 0

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
        found = below(self.process)
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
        pages count once per process. What other stages asked of the server before has no part in it.
        """
        total = 0
        for process in self.processes():
            with suppress(OSError):  # it ended meanwhile
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
                total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
        return max(total, self.load_memory_bytes)

    def forget_peak(self) -> None:
        """Let the kernel record the peaks anew, from what the processes hold now."""
        for process in self.processes():
            with suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")  # proc_pid_clear_refs(5)

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


def longest_sequence(server: Server, client: httpx.Client) -> int:
    """The longest sequence that the server takes. Checks first that the port is not another server's."""
    try:
        models = client.get("/v1/models").raise_for_status().json()["data"]
        card = next(card for card in models if card["id"] == server.options.name)
        if server.options.runtime == llamacpp.NAME:
            root = str(Path(client.get("/props").raise_for_status().json()["model_path"]).parent)
            length = llamacpp.longest(card)
        else:
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
    end_supervised(server.process, server.seen)


def end_supervised(process: Supervisor, seen: set[psutil.Process]) -> None:
    """End a supervisor and what it supervises; return when they have ended.

    seen: the supervised processes that are known; those that run now are added.
    """
    try:
        if process.stdin is not None:
            process.stdin.close()
        # A fork of this process may hold the pipe open, so the supervisor gets a signal as well.
        process.terminate()
        process.wait(GRACE_SECONDS + 10)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Processes are left only if the supervisor itself was killed or hangs.
        seen.update(below(process))
        for one in seen:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(seen, timeout=5)
        if process.poll() is None:
            process.kill()
            process.wait()


def below(process: Supervisor) -> list[psutil.Process]:
    """The running processes below a supervisor."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def tell(process: Supervisor, what: bytes) -> None:
    """Tell the supervisor `+`: the server is ready, and gets time to shut down from now on; or `k`, a note and a newline."""
    if process.stdin is not None:
        process.stdin.write(what)
        process.stdin.flush()
