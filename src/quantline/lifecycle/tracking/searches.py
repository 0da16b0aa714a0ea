"""A search's runs: one for the search, one nested for each candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.core.secrets import Scrubber
from quantline.core.text import digits
from quantline.lifecycle.tracking.description import NOTE, opening
from quantline.lifecycle.tracking.projection import PROJECTION, RunContent, digest, flatten, numbers
from quantline.lifecycle.tracking.store import Limits, PublishReport
from quantline.lifecycle.tracking.view import SEARCH_COLUMNS, metric_name
from quantline.lifecycle.tracking.writer import send
from quantline.pipeline.figures import MISSING

# A search with more candidates than this has no run for those that were not measured; they are in its table.
_MOST = 200


def publish_plan(
    record: Mapping[str, Any], files: Mapping[str, Path], *, uri: str, experiment: str, timeout_seconds: float = 10
) -> PublishReport:
    """Publish a search. record, files: see `plan_search`. uri: see `resolve_uri`. timeout_seconds: for one request.

    Raises:
        TrackingError: as `writer.publish`.
    """
    remedy = "Nothing is lost: the same search again finds its measurements, and publishes them."
    plan = plan_search(record, files, Scrubber(uri))
    return send([plan], uri=uri, experiment=experiment, limits=Limits(timeout_seconds), remedy=remedy)


def plan_search(record: Mapping[str, Any], files: Mapping[str, Path], scrubber: Scrubber) -> RunContent:
    """The run of a search, with its candidates as children.

    Args:
        record: of `planning.search_record`.
        files: artifacts of the run by their name there.
        scrubber: takes credentials out of what was typed.
    """
    command = scrubber(str(record["command"]))
    name = f"search {digest(command)[:8]}"
    rows = [{**row, "why": scrubber(str(row["why"]))} for row in record["candidates"]]
    if len(rows) > _MOST:
        rows = [row for row in rows if row["documents"] is not None]
    known = {
        key: record[key] for key in ("goal", "minimize", "loss_at_most", "size_at_most", "answer", "line", "nearest")
    }
    params = flatten({"command": command, **{key: value for key, value in known.items() if value is not None}})
    counts = {"candidates": len(record["candidates"]), "measured": record["measured"]}
    metrics = numbers({f"search/{key}": value for key, value in counts.items()})
    tags = {**_columns(next((row for row in rows if row["state"] == "winner"), {})), "state": "search"}
    tags["why"] = f"{record['goal']}: {record['answer'] or 'nothing meets it'}"
    tags[NOTE] = describe(name, {**record, "command": command})
    started = float(record["started"])
    # MLflow lists the newest first: here the winner, then as the states go.
    children = [_candidate(row, started - at / 1000) for at, row in enumerate(rows)]
    return RunContent(
        name, {"quantline.role": "search", "quantline.search": name}, tags, params, metrics, {}, dict(files),
        digest([PROJECTION, params, metrics, [child.complete for child in children]]), started, float(record["seconds"]),
        children,
    )  # fmt: skip


def _candidate(row: Mapping[str, Any], started: float) -> RunContent:
    measured = {
        metric_name("change_percent"): row["change_percent"], metric_name("low"): row["low"],
        metric_name("high"): row["high"], metric_name("kl"): row["kl"],
        metric_name("size_mb"): None if row["size_bytes"] is None else row["size_bytes"] / 1e6,
        "search/share_of_text": row["share"], "search/predicted_kl": row["predicted_kl"],
        metric_name("speed_up"): row["speed_up"],
    }  # fmt: skip
    params = flatten({key: row[key] for key in ("line", "method") if row[key] is not None})
    tags = {**_columns(row), NOTE: f"{opening(row['name'])} {row['state']}. {row['why']}"}
    if row["line"]:
        tags[NOTE] += f"\n\n- **Make it**: `python -m stages.run {row['line']}`"
    identity = {"quantline.role": "candidate", "quantline.result": digest(dict(row))}
    return RunContent(
        row["name"], identity, tags, params, numbers({key: value for key, value in measured.items() if value is not None}),
        {}, {}, digest([PROJECTION, identity["quantline.result"]]), started, 0.0,
    )  # fmt: skip


def _columns(row: Mapping[str, Any]) -> dict[str, str]:
    def shown(key: str, text: str) -> str:
        return MISSING if row.get(key) is None else text.format(**row)

    size = row.get("size_bytes")
    texts = (
        shown("state", "{state}"), shown("change_percent", "{change_percent:+.2f} % [{low:+.2f}, {high:+.2f}]"),
        MISSING if row.get("kl") is None else digits(float(row["kl"]), 3),
        MISSING if size is None else f"{digits(size / 1e6, 3)} MB", shown("documents", "{documents}"), shown("why", "{why}"),
    )  # fmt: skip
    return dict(zip(SEARCH_COLUMNS, texts, strict=True))


def describe(name: str, record: Mapping[str, Any]) -> str:
    """The description of a search, Markdown: its goal, its answer, its front."""
    found = record["candidates"]
    lines = [f"{opening(name)} {record['goal']}.", ""]
    if record["answer"] is None:
        lines.append(f"**Nothing meets it.** The nearest is `{record['nearest']}`.")
    else:
        lines.append(f"**Answer: `{record['answer']}`**")
    lines += [
        "",
        f"Measured {record['measured']} of {len(found)} candidates; `why` of each says what became of it.",
        "",
    ]
    lines += _table([row for row in found if row["front"]])
    if record["line"]:
        lines += ["", f"Its line for params.yaml: `{record['line']}`"]
    return "\n".join([*lines, "", f"The same again: `{record['command']}`"])


def _table(front: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(SEARCH_COLUMNS)[:-1]
    rows = [(f"`{row['name']}`", *_columns(row).values()) for row in sorted(front, key=lambda row: row["size_bytes"])]
    return [
        f"| {' | '.join(cells)} |"
        for cells in [("front", *columns), ("---",) * (1 + len(columns)), *(r[:-1] for r in rows)]
    ]
