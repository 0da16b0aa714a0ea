"""Which figures of a session cannot be trusted, and why: notes for the stage, and what the report leaves out.

A figure that its own note disowns is worse than none: it is read without the note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantline.serving.memory import GIB

# vLLM's log has steps of 0.01 GiB. Additions to the tensors (rotary tables, repacked scales) are below this share.
_LOG_STEP, _ADDED = GIB // 100, 1.15
# Median over mean time per token: 0.5 to 1 was seen normally, and 0.003 when chunks had piled up.
_BUNCHED = 0.2
Row = Mapping[str, Any]


def notes(document: Row) -> list[str]:
    """A sentence for each thing that makes figures of `speed.json` doubtful."""
    load = busy(document["session"])
    found = memory_notes(document["servers"]) + bunch_notes(document["rows"])
    if load > 1:
        found.append(
            f"the machine was busy with other work (load {load:.1f} per core): trust the ratios, not the speeds"
        )
    return found


def memory_notes(servers: Sequence[Row]) -> list[str]:
    """A note on each server that holds more weights than its checkpoint: it loaded float weights."""
    return [
        f"{server['model']}: vLLM holds {server['weights_memory_bytes'] / 1e9:.2f} GB of weights, the checkpoint has "
        f"{server['checkpoint_bytes'] / 1e9:.2f} GB: it did not load the quantized weights; this is not the variant's speed"
        for server in servers
        if _unpacked(server)
    ]


def bunch_notes(rows: Sequence[Row]) -> list[str]:
    """A note if tokens of an answer arrived together: their times then tell when they were sent, not generated."""
    return [
        f"{row['model']}, {row['concurrency']} at a time: tokens arrived in bunches, half of them within "
        f"{row['itl_ms_median']:.2g} ms of the previous one, while the mean is {row['tpot_ms_median']:.2g} ms; the machine "
        "is too small for server and client, so trust only tokens/s and the time of a request"
        for row in rows
        if _bunched(row)
    ]


def busy(session: Row) -> float:
    """The load of other work per core when the session began; 0 if it was not recorded."""
    return float(session.get("load_average") or 0) / float(session.get("threads") or 1)


def trusted(document: Row) -> tuple[dict[str, Any], list[str]]:
    """The content of `speed.json` without what its notes disown, and a phrase for each thing that was left out."""
    kept, why = dict(document), []
    servers = document.get("servers") or []
    if any(_unpacked(server) for server in servers if server["model"] == "variant"):
        return {**kept, "rows": [], "ratios": []}, ["every speed, since vLLM did not load the quantized weights"]
    rows = [dict(row) for row in document.get("rows") or []]
    if busy(document.get("session") or {}) > 1:
        rows, why = [], ["tokens/s and times, since the machine was busy with other work"] if rows else []
    for row in rows:
        if _bunched(row):
            row.update(dict.fromkeys(("itl_ms_median", "itl_ms_p99", "ttft_ms_median", "ttft_ms_p99")))
            why = ["times of tokens that arrived in bunches"]
    return {**kept, "rows": rows}, why


def _unpacked(server: Row) -> bool:
    stored = server.get("checkpoint_bytes")
    return stored is not None and server["weights_memory_bytes"] > _ADDED * stored + _LOG_STEP


def _bunched(row: Row) -> bool:
    median, mean = row.get("itl_ms_median"), row.get("tpot_ms_median")
    return median is not None and mean is not None and median < _BUNCHED * mean
