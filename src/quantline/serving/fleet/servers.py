"""The servers of a fleet: one a variant, started again with growing pauses when it ends."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantline.config.fleet import RestartConfig
from quantline.config.section import Section
from quantline.core.errors import QuantlineError
from quantline.serving import llamacpp
from quantline.serving.command import ServerOptions, flags_of
from quantline.serving.running import Server
from quantline.serving.server import serve

# A server that ran for as long starts without a pause when it ends: it is no server that cannot start.
STEADY_SECONDS = 60.0


class Start(Section):
    """How one server is started; plain, so that a running fleet can be told of it.

    names: under which requests ask for it, its own first. folder: the checkpoint. queued_requests, queued_tokens: that may
    wait in it; None is no limit. more: flags that come last. server: its options; the name there is not used.
    """

    names: tuple[str, ...]
    python: str
    folder: str
    log: str
    server: ServerOptions
    queued_requests: int | None = None
    queued_tokens: int | None = None
    more: tuple[str, ...] = ()

    def options(self) -> ServerOptions:
        """The server's options, with every name under which it answers and the limits of its queue."""
        options = replace(self.server, name=self.names[0])
        if options.runtime == llamacpp.NAME:
            # It answers every name with its own, and limits no queue. Its threads spin, so that the proven ones are too many
            # beside other servers; the last time that an option is given counts.
            threads = [] if options.threads is None else ["--threads", str(options.threads)]
            return replace(options, proven=(*flags_of(options), *threads, *self.more))
        # The last time that an option is given counts for vLLM, so that this adds names to the one that is always given.
        flags = [*flags_of(options), "--served-model-name", *self.names]
        flags += self.more
        for flag, value in (
            ("--max-num-queued-reqs", self.queued_requests), ("--max-num-queued-tokens", self.queued_tokens),
        ):  # fmt: skip
            if value is not None:
                flags += [flag, str(value)]
        return replace(options, proven=tuple(flags))


@dataclass
class Keeper:
    """Keeps one server running until it is told to end it.

    starts: how often it was started. fault: why it does not run; empty while it does.
    """

    start: Start
    restart: RestartConfig
    starts: int = 0
    fault: str = ""
    server: Server | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """Of the variant."""
        return self.start.names[0]

    def begin(self) -> None:
        """Start the server, without waiting for it."""
        self._thread = threading.Thread(target=self._keep, name=f"keeper of {self.name}", daemon=True)
        self._thread.start()

    def has_failed(self) -> bool:
        """Whether its first start failed."""
        return bool(self.fault) and not self.ready.is_set()

    def is_starting(self) -> bool:
        """Whether it was told to begin and no start has succeeded yet."""
        return self._thread is not None and not self.ready.is_set()

    def stop(self) -> None:
        """Let it end, without waiting for that."""
        self._stop.set()

    def end(self) -> None:
        """End the server; return when all its processes have ended."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _keep(self) -> None:
        pause = self.restart.first_seconds
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._serve_once()
            except (QuantlineError, OSError) as error:
                self.fault = str(error)
            self.server = None
            if time.monotonic() - began > STEADY_SECONDS:
                pause = self.restart.first_seconds
            self._stop.wait(pause)
            pause = min(pause * 2, self.restart.most_seconds)

    def _serve_once(self) -> None:
        start = self.start
        self.starts += 1
        log = Path(start.log)
        if log.exists():  # of the server before, which may say why it ended
            os.replace(log, log.with_suffix(".previous.log"))
        with serve(Path(start.python), Path(start.folder), start.options(), log=log) as server:
            self.server, self.fault = server, ""
            self.ready.set()
            while not self._stop.wait(0.1):
                server.require_alive("serving")
