"""The description of a variant's run, Markdown: what it is, its figures, how to serve, fetch and rebuild it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantline.data.download import spoken_name
from quantline.evaluation.bootstrap import caution
from quantline.lifecycle.tracking.view import EXPERIMENT, columns_of, report_path
from quantline.pipeline.figures import MISSING, Row
from quantline.pipeline.records import VariantRecord

NOTE = "mlflow.note.content"


def describe(record: VariantRecord, results: Sequence[Mapping[str, Any]], row: Row, fingerprint: str) -> str:
    """The description of a variant.

    Args:
        record: of the variant.
        results: of its stages, without credentials.
        row: of `pipeline.figures.measured`.
        fingerprint: of its run. The link to the report has `view.EXPERIMENT` for the experiment's id.
    """
    model = dict(record.config.get("model") or {})
    name = spoken_name(model)
    revision = f" at `{model['revision']}`" if model.get("revision") and model.get("repo") else ""
    if row["baseline"]:
        about = f"{opening(record.name)} the float model `{name}`{revision}, with which all others are compared."
    else:
        about = f"{opening(record.name)} the model `{name}`{revision}, quantized with `{record.overrides}`."
    # The first lines are read without unfolding the rest. What is before the change is in the line above.
    shown = list(columns_of(row).items())[3:]
    figures = " · ".join(f"{key} {text}" for key, text in shown if text != MISSING)
    lines = [about, *(["", figures] if figures else []), "", *(f"- {line}" for line in _verdict(results, row))]
    convert = any(result["stage"] == "convert" and result["status"] == "ok" for result in results)
    if convert and not row["baseline"]:
        lines += ["", *(f"- **{word}**: {text}" for word, text in _ways(record.name, row, fingerprint))]
    return "\n".join([*lines, "", f"[The report: which variant to ship, and why](#{report_path(EXPERIMENT)})"])


def opening(name: str) -> str:
    """How a description begins, by which one that a user wrote is told from it."""
    return f"**{name}**:"


def _verdict(results: Sequence[Mapping[str, Any]], row: Row) -> list[str]:
    lines = []
    for stage, reason in row["reasons"].items():
        lines.append(f"Refused by {stage}: {' '.join(str(reason).split())}")
    if row["served"]:
        lines.append("vLLM served it.")
    if not row["baseline"]:
        lines.append(_change(row))
    evaluated = next((result for result in results if result["stage"] == "evaluate"), {})
    if not row["baseline"] and (few := caution((evaluated.get("metrics") or {}).get("documents"))):
        lines.append(f"Caution: {few}.")
    flags = (evaluated.get("tables") or {}).get("flags")
    lines += [f"Alarm: {' '.join(str(flag.get('message')).split())}" for flag in flags or []]
    return lines


def _change(row: Row) -> str:
    low, high = row["difference_low_percent"], row["difference_high_percent"]
    if row["difference_percent"] is None:
        return "Its quality was not measured."
    if low is None or high is None:
        return "Its perplexity has no interval."
    if low > 0:
        return "Worse than the float model: the interval of the change lies above zero."
    return "Better than the float model on this text." if high < 0 else "As good as the float model on this text."


def _ways(name: str, row: Row, fingerprint: str) -> list[tuple[str, str]]:
    serve = [("Serve", f"`python -m stages.serve variant={name}`")] if row["served"] else []
    return [
        *serve,
        ("Fetch", f"`python -m stages.promote variant={name} alias=production` registers it, if it passes the gates; then "
         "on any machine `python -m stages.fetch model=NAME alias=production out=DIR`, with the name that "
         "`python -m stages.registry` lists"),
        ("Rebuild", f"`python -m stages.rebuild run={fingerprint[:12]} out=DIR` makes it again and compares every file"),
    ]  # fmt: skip
