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
# Of the machine's cores. Servers that wait and the client's own start stay below it.
_BUSY_SHARE = 0.25
Row = Mapping[str, Any]


def notes(document: Row) -> list[str]:
    """A sentence for each thing that makes figures of `speed.json` doubtful."""
    found, session = memory_notes(document["servers"]) + bunch_notes(document["rows"]), document["session"]
    if busy(session):
        found.append(
            f"other programs kept {session['cores_in_use']:.1f} of the {session['threads']} cores busy when the measurement "
            "began, so tokens/s and times are worse than they would be alone; the ratios to the float model hold, since the "
            "two took turns. Measure again on an idle machine"
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


def busy(session: Row) -> bool:
    """Whether other programs used much of the machine when the session began; no, if that was not recorded."""
    return float(session.get("cores_in_use") or 0) > _BUSY_SHARE * float(session.get("threads") or 1)


def trusted(document: Row) -> tuple[dict[str, Any], list[str]]:
    """The content of `speed.json` without what its notes disown, and a phrase for each thing that was left out."""
    kept, why = dict(document), []
    servers = document.get("servers") or []
    if any(_unpacked(server) for server in servers if server["model"] == "variant"):
        return {**kept, "rows": [], "ratios": []}, ["every speed, since vLLM did not load the quantized weights"]
    rows = [dict(row) for row in document.get("rows") or []]
    if busy(document.get("session") or {}):
        rows, why = [], ["tokens/s and times, since other programs used the machine"] if rows else []
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
