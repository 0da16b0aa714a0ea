"""Taking a server over from the stage before, and handing it on to the next one; see `quantline.serving.keeping`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from quantline.core.errors import ServerError
from quantline.serving.command import ServerOptions, command_line
from quantline.serving.keeping import Keeping, Kept, Role, identity, kept_of
from quantline.serving.memory import MEMORY_SHARE, server_bytes
from quantline.serving.running import Server, Supervisor, below, end, end_supervised, longest_sequence, tell


def known(
    python: Path, model: Path, options: ServerOptions, variables: Mapping[str, str], keeping: Keeping
) -> dict[str, Any]:
    """By what a kept server is found."""
    command = command_line(python, model, options, options.process.port or 0)
    return {
        "owner": keeping.owner, "role": keeping.role, "started_by": keeping.stage,
        "identity": identity(command, variables, keeping.content),
    }  # fmt: skip


def taken_over(model: Path, options: ServerOptions, keeping: Keeping, wanted: Mapping[str, Any]) -> Server | None:
    """The same server, if a stage before handed it on."""
    for kept in kept_of(keeping.owner):
        known = kept.known
        if known["identity"] != wanted["identity"] or not Path(known["log"]).is_file():
            continue
        process = kept.take()
        if process is None:
            continue
        server = Server(
            model, options, known["port"], Path(known["log"]), process, known["load_seconds"], known["max_model_len"],
            taken_over=known["started_by"], load_memory_bytes=known["load_memory_bytes"],
        )  # fmt: skip
        try:
            with server.client(timeout_seconds=10.0) as client:
                longest_sequence(server, client)
        except ServerError:
            end(server)
            continue
        server.forget_peak()
        print(
            f"taking over the server of {model.name} from {server.taken_over}, which waited {server.load_seconds:.0f} s "
            f"for it; log: {server.log}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return server
    return None


# The supervisors of servers that were handed on: their parent would otherwise complain that they run.
_HANDED_ON: list[Supervisor] = []


def hand_on(server: Server, known: Mapping[str, Any], keeping: Keeping) -> bool:
    """Let a later stage take over a server; False if it has ended."""
    note = {
        **known, "started_by": server.taken_over or keeping.stage, "port": server.port, "log": str(server.log),
        "load_seconds": server.load_seconds, "max_model_len": server.max_model_len,
        "load_memory_bytes": server.load_memory_bytes,
    }  # fmt: skip
    if server.process.poll() is not None:
        return False
    try:
        tell(server.process, b"k" + json.dumps(note).encode() + b"\n")
    except OSError:
        return False
    _HANDED_ON.append(server.process)
    return True


def make_room(keeping: Keeping, model: Path, options: ServerOptions) -> None:
    """End the kept servers that cannot stay beside one that starts now: of another variant, or without memory for both."""
    alone = options.device == "cuda" or options.process.port is not None
    for kept in kept_of(keeping.owner):
        small = server_bytes(model, options.process, options.device) < MEMORY_SHARE * psutil.virtual_memory().available
        if alone or kept.known["role"] == keeping.role or not small:
            end_kept(kept)


def end_all(owner: int, role: Role | None = None) -> None:
    """End the servers that wait for a stage of an owner; of one role, or all."""
    for kept in kept_of(owner):
        if role in (None, kept.known["role"]):
            end_kept(kept)


def end_kept(kept: Kept) -> None:
    """End a server that waits for a stage; return when its processes have ended."""
    process = kept.take()
    if process is not None:
        end_supervised(process, set(below(process)))
