"""Collects what `stages.promote` registers for a variant: its tags and documents, from results and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantline.checkpoints.model_files import CARD
from quantline.core.errors import UserError
from quantline.lifecycle.promotion_gates import perplexity_increase_high
from quantline.lifecycle.storage.dvc_lock import REPAIR
from quantline.lifecycle.storage.dvc_outputs import hashes_of, unlocked_stages, with_locks
from quantline.lifecycle.tracking.reader import Current
from quantline.lifecycle.tracking.registry import SERVING_TAG, Promotion
from quantline.lifecycle.tracking.store import experiment_name
from quantline.pipeline.config import Config
from quantline.pipeline.lineage.chain import as_values, local_lineage, require_lineage
from quantline.pipeline.lineage.report import as_text
from quantline.pipeline.records import VariantRecord
from quantline.pipeline.server import record_line

_DOCUMENTS = (("convert", "conversion_proof.json"), ("evaluate", "comparison.json"))


def with_whole_lock(record: VariantRecord) -> VariantRecord:
    """A variant of the pipeline with its part of dvc.lock; a manual run as it is, since DVC does not have its outputs.

    Raises:
        UserError: dvc.lock does not have the outputs of all stages that are here, or a `dvc` command is working.
    """
    (record,) = with_locks([record])
    if stages := unlocked_stages(record):
        raise UserError(
            f"variant={record.name}: dvc.lock lacks {', '.join(stages.values())} as they are here, so that it could not "
            f"be kept and rebuilt; {REPAIR}, then promote again"
        )
    return record


def model_name_of(config: Config) -> str:
    """The registered model's name: the configured name, else one from the float model's name."""
    own = config.tracking.model_copy(update={"experiment": None})
    return config.promote.name or experiment_name(own, config.model).replace("/", "-")


def promotion_of(record: VariantRecord, run: Current, *, model: str, card: str, root: Path) -> Promotion:
    """What to register for a variant that passed its gates.

    Args:
        record: of the variant.
        run: the variant's run.
        model: name of the registered model.
        card: the text of its model card, for the folder in which it is fetched.
        root: the checkout.
    """
    results = {str(result["stage"]): result for result in record.results}
    chain = require_lineage(local_lineage(root, record.name), record.name, root)
    documents = {
        CARD: card,
        "lineage.json": json.dumps(as_values(chain), indent=2, sort_keys=True), "lineage.txt": as_text(chain) + "\n",
        "evaluation.json": json.dumps(results["evaluate"]["metrics"], indent=2, sort_keys=True),
    }  # fmt: skip
    for stage, file in _DOCUMENTS:
        path = record.outputs[stage] / file
        if path.is_file():
            documents[file] = path.read_text(encoding="utf-8")
    return Promotion(
        model, record.name, run.run_id, record.outputs["convert"], results["convert"]["outputs"],
        _tags(record, results, run.fingerprint), documents,
        _description(record, model, as_text(chain).rpartition("\n\n")[2]),
    )  # fmt: skip


def _description(record: VariantRecord, model: str, lineage: str) -> str:
    """What the registry's page says of a version, Markdown."""
    fetch = f"Fetch it, verified:\n\n    python -m stages.fetch model={model} alias=production out=DIR"
    line = record_line(record, ".")
    serve = [f"Serve it in the folder of its files:\n\n    {line}"] if line else []
    return "\n\n".join([fetch, *serve, lineage])


def _tags(record: VariantRecord, results: dict[str, Any], fingerprint: str) -> dict[str, str]:
    metrics = results["evaluate"]["metrics"]
    high = perplexity_increase_high(metrics)
    tags = {
        "quantline.variant": record.name, "quantline.fingerprint": fingerprint,
        "quantline.output_hash": str(results["convert"]["output_hash"]),
        "quantline.overrides": record.overrides, "quantline.served": "yes" if results["serve_smoke"]["status"] == "ok" else
        "no", "quantline.perplexity": repr(metrics.get("reference_perplexity")),
        "quantline.perplexity_increase_high": repr(high), "quantline.size_bytes": str(metrics.get("size_bytes")),
        SERVING_TAG: record_line(record, ".") or "",
        "quantline.dvc": " ".join(sorted(hashes_of(record.lock))), "quantline.commit": record.commit or "",
    }  # fmt: skip
    return {key: value for key, value in tags.items() if value}
