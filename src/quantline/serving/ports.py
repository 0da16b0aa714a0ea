"""Ports to serve on."""

from __future__ import annotations

import errno
import random
import socket
from contextlib import closing, suppress

from quantline.core.errors import UserError

# Below those that systems give to outgoing connections. A server listens only after it has loaded for many seconds, in which
# one of those may be taken by any other process, and by its own.
_OURS = range(20_000, 32_768)
_TRIES = 20


def free_port(host: str) -> int:
    """A free port of `host`.

    Raises:
        UserError: `host` is not an address of this machine.
    """
    for port in random.sample(_OURS, _TRIES):
        with suppress(UserError):
            require_free(host, port, "take another")
            return port
    with closing(_bound(host, 0)) as listener:
        return int(listener.getsockname()[1])


def require_free(host: str, port: int, remedy: str) -> None:
    """Check that a server can listen on `port`. remedy: what to do where it is taken.

    Raises:
        UserError: it is taken, or `host` is not an address of this machine.
    """
    _bound(host, port, remedy).close()


def _bound(host: str, port: int, remedy: str = "") -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # As the server does. Otherwise a port that was just released would count as taken for a minute.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is taken; stop the process that listens on it, or {remedy}"
            ) from None
        raise UserError(
            f"host {host}, port {port}: cannot listen there ({error}); set another serve.process.host or port"
        ) from None
    return listener
