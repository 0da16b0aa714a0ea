"""Write the report's folder: index.html, report.md, plots/ and data/."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from quantline import __version__
from quantline.config.report import ReportConfig
from quantline.core.errors import UserError
from quantline.core.secrets import Scrubber
from quantline.data.download import spoken_name
from quantline.pipeline.names import model_of
from quantline.pipeline.paths import REPORT_MANIFEST
from quantline.pipeline.records import VariantRecord
from quantline.report import choice, layer_plots, plots, run_plots, run_tables, tables
from quantline.report.document import Report
from quantline.report.evidence import Evidence, Row, gather, made_of
from quantline.report.recommendation import recommend
from quantline.report.table import as_csv


def build(
    records: Sequence[VariantRecord], home: Path, options: ReportConfig, out: Path, drill: Row | None = None
) -> Report:
    """Write the report of these results into `out`, an empty folder, and return it. Equal results give equal bytes.

    Args:
        records: the variants of one model, the baseline among them.
        home: the folder with the outputs of their stages, artifacts/ or artifacts/MODEL.
        options: rules and preferences of the recommendation.
        out: the folder to write to.
        drill: the result of the fault drill of a fleet of these variants; None if there is none.

    Raises:
        UserError: there is no result to report on, or a file of a stage cannot be read.
    """
    from quantline.report.markdown import as_markdown
    from quantline.report.page import as_html

    if not records:
        raise UserError("there are no results to report on; run `dvc repro` first")
    scrubber = Scrubber()
    clean = [
        VariantRecord(record.name, scrubber.value(record.config), scrubber(record.overrides),
                      scrubber.value(record.results), record.folder)
        for record in records
    ]  # fmt: skip
    report = compile_report(gather(clean, home), options, scrubber.value(drill))
    files = {f"data/{table.name}.csv": as_csv(table) for table in report.tables.values()}
    files |= {f"data/{table.name}.json": as_json(table.rows) for table in report.tables.values()}
    files["data/recommendation.json"] = as_json(asdict(report.recommendation))
    chosen, headline = report.recommendation.chosen, report.recommendation.headline
    manifest = {"version": __version__, "model": report.model, "made_of": made_of(records), "chosen": chosen}
    manifest["headline"] = headline
    files[REPORT_MANIFEST] = as_json({**manifest, "variants": [record.name for record in records]})
    files |= {f"plots/{name}.svg": plot.file for name, plot in report.plots.items()}
    files["report.md"] = as_markdown(report)
    files["index.html"] = as_html(report)
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return report


def compile_report(evidence: Sequence[Evidence], options: ReportConfig, drill: Row | None = None) -> Report:
    """All tables, plots and texts."""
    made = tables.all_tables(evidence, options.worst_layers)
    if any(item.speed.get("library") for item in evidence):
        made["library"] = run_tables.library(evidence)
    if drill is not None:
        made["fleet"] = run_tables.fleet(drill)
    rows, order = made["variants"].rows, plots.order_of(evidence)
    config: dict[str, Any] = evidence[0].record.config
    model = spoken_name(config.get("model") or {})
    recommendation = recommend(rows, options, model=model)
    limit = next((rule.at_most for rule in options.rules.values() if rule.column == "difference_high_percent"), None)
    gates = [(item.tasks.get("gate") or {}).get("limit") for item in evidence]
    gate = next((value for value in gates if isinstance(value, int | float)), None)
    drawn = [
        plots.quality_size(rows, order, limit, recommendation.chosen),
        plots.forest(made["quality"].rows, order),
        run_plots.tasks(made["tasks"].rows, order, gate),
        *layer_plots.heat_maps(evidence),
        layer_plots.restored(made["restored"].rows, order),
        *choice.fronts(evidence),
        *choice.heat_maps(evidence),
        run_plots.speed(evidence, order),
        run_plots.ratios(evidence, order),
        plots.memory(made["memory"], order),
        *(run_plots.monitor(item) for item in evidence),
    ]
    glossary = yaml.safe_load((Path(__file__).parent / "glossary.yaml").read_text(encoding="utf-8"))
    level = ((config.get("evaluate") or {}).get("bootstrap") or {}).get("level", 0.95)
    return Report(
        model=model, summary=_summary(evidence, config), recommendation=recommendation,
        tables=made, plots={plot.name: plot for plot in drawn if plot}, glossary=glossary, level=float(level),
        alarm_advice=_alarm_advice([row for row in rows if row["alarms"]]),
        alarms={item.name: item.flags for item in evidence if item.flags and not item.is_baseline},
        unwatched=[item.name for item in evidence if item.flags is None and not item.is_baseline],
        of_several=bool(model_of(evidence[0].whole_name)),
    )  # fmt: skip


def _alarm_advice(rows: Sequence[Row]) -> str:
    """What to do about the alarms of these variants: fewer bits explain them, 8 do not."""
    low = [row for row in rows if (row["bits"] or 0) < 8]
    narrow = max((row["bits"] or 0 for row in low), default=0)
    if not low:
        return (
            "At 8 bits that is rounding only where a limit does not suit this model (conf/instruments): look for a fault in "
            "the weights before you ship anything."
        )
    wider = "8 bits or layers=attention8_mlp4" if narrow == 4 else f"{4 if narrow < 4 else 8} bits"
    return (
        "The weights have a fault, or the bits are too few for this model: check it before you ship anything, and try "
        f"{wider}."
    )


def _summary(evidence: Sequence[Evidence], config: Row) -> list[tuple[str, str]]:
    """The conditions of measurement, in a few words."""
    evaluate = config.get("evaluate") or {}
    found = evidence[0].metrics("evaluate")
    tokens, documents = found.get("tokens_scored"), found.get("documents")
    text = f"{evaluate.get('name', 'evaluation text')}"
    if tokens and documents:
        text += f": {tokens:,.0f} tokens of {documents:,.0f} documents".replace(",", " ")
    session: Row = next((item.speed["session"] for item in evidence if item.speed.get("session")), {})
    devices = {
        str((result.get("environment") or {}).get("device")) for item in evidence for result in item.results.values()
    }
    where = ", ".join(sorted(device for device in devices if device != "None")) or "not recorded"
    if session.get("device_name") or session.get("host"):
        where += f" ({session.get('device_name') or session['host']})"
    variants = sum(not item.is_baseline for item in evidence)
    return [("Model", spoken_name(config.get("model") or {})), ("Variants", str(variants)), ("Judged on", text),
            ("Measured on", where)]  # fmt: skip


def as_json(value: Any) -> str:
    """Strict JSON: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
