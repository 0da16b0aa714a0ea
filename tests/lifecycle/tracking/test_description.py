from __future__ import annotations

from pathlib import Path

import pytest
from variant_records import REFUSED, four

from quantline.core.secrets import Scrubber
from quantline.lifecycle.tracking.description import NOTE
from quantline.lifecycle.tracking.projection import plan_variant


@pytest.fixture
def notes(tmp_path: Path) -> dict[str, str]:
    return {record.name: plan_variant(record, Scrubber(), []).tags[NOTE] for record in four(tmp_path)}


def test_description_says_what_the_variant_is_its_figures_and_the_verdict(notes: dict[str, str]) -> None:
    text = notes["awq-w4-g128"]
    assert text.startswith("**awq-w4-g128**: the model `demo`, quantized with `method=awq bits=4`.")
    assert "\nchange of perplexity +1.24 % [+0.99, +1.55] · size 2.50 MB · speed-up 1.32x · served yes\n" in text
    assert "Worse than the float model" in text
    assert "vLLM served it." in text


def test_description_has_the_commands_and_links_to_the_report(notes: dict[str, str], tmp_path: Path) -> None:
    text = notes["awq-w4-g128"]
    fingerprint = plan_variant(four(tmp_path)[1], Scrubber(), []).tags["quantline.fingerprint"]
    assert "`python -m stages.serve variant=awq-w4-g128`" in text
    assert "`python -m stages.promote variant=awq-w4-g128 alias=production`" in text
    assert f"`python -m stages.rebuild run={fingerprint[:12]} out=DIR`" in text
    assert "](#/experiments/EXPERIMENT_ID/runs?workflowType=machine_learning&searchFilter=tags." in text


def test_refused_variant_has_its_reason_and_no_command_to_serve_it(notes: dict[str, str]) -> None:
    text = notes["gptq-w8-g128"]
    assert f"Refused by serve_smoke: {REFUSED}" in text
    assert "stages.serve" not in text


def test_float_model_is_named_as_the_baseline(notes: dict[str, str]) -> None:
    assert notes["float"].startswith("**float**: the float model `demo`")
    assert "stages.promote" not in notes["float"]


def test_few_documents_are_told_of_beside_the_verdict(tmp_path: Path) -> None:
    record = four(tmp_path)[1]
    for result in record.results:
        if result["stage"] == "evaluate":
            result["metrics"]["documents"] = 13
    assert "- Caution: the intervals rest on 13 documents only" in plan_variant(record, Scrubber(), []).tags[NOTE]
