"""Ports to serve on."""

from __future__ import annotations

import errno
import socket
from contextlib import closing

from quantline.core.errors import UserError


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on.

    Raises:
        UserError: `host` is no address of this machine.
    """
    with closing(_bound(host, 0)) as listener:
        return int(listener.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Do nothing where `port` can be listened on.

    Raises:
        UserError: it is taken, or `host` is no address of this machine.
    """
    _bound(host, port).close()


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # As the server does; else a port just given back would count as taken for a minute.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken; end what listens there, or leave port null") from None
        raise UserError(
            f"host {host}, port {port}: cannot listen there ({error}); give another, or leave them"
        ) from None
    return listener
