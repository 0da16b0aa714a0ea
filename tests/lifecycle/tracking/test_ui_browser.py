"""The UI as a person uses it: a real browser selects the variants and opens their comparison."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from mlflow_server import running
from variant_records import four

import tests.lifecycle.tracking.test_writer as test_tracking
from tests.lifecycle.tracking.test_writer import to, view_path

database, store = test_tracking.database, test_tracking.root  # fixtures
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NAMES = ("float", "awq-w4-g128", "gptq-w4-g128", "gptq-w8-g128")
METRICS = ("reference_perplexity", "perplexity_difference", "size_bytes", "compression_ratio", "quantize_seconds")
MILLISECONDS = 240_000  # a page may take as long on a busy machine

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path"),
]


@pytest.fixture
def served(store):
    """The address of the UI as `make ui` starts it, and the experiment's id, of a store with four variants and a report."""
    folder = store / "report"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "manifest.json").write_text('{"chosen": "float", "headline": "Ship it.", "variants": ["float"]}')
    experiment = to(store, four(store / "work"), report=folder).experiment_id
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running(store, port, "ui"):
        yield f"http://127.0.0.1:{port}", experiment


def compare(address: str, experiment: str, pictures: Path) -> tuple[str, str]:
    """Open the table of variants, select all, open their comparison; the texts of both pages."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1900, "height": 720})
            page.set_default_timeout(MILLISECONDS)
            page.goto(f"{address}/#{view_path(experiment)}")
            for name in NAMES:
                page.get_by_role("link", name=name, exact=True).wait_for()
            if (assistant := page.get_by_role("button", name="Close", exact=True)).count():
                assistant.click()  # MLflow's, which takes a quarter of the page
            table = page.inner_text("body")
            page.screenshot(path=pictures / "mlflow-variants.png")
            page.get_by_role("checkbox", name="Select all runs").click()
            page.get_by_role("button", name="Compare", exact=True).click()
            page.get_by_text(f"Comparing {len(NAMES)} Runs from 1 Experiment").wait_for()
            page.get_by_text("compression_ratio", exact=True).last.wait_for()
            for part in ("Visualizations", "Parameters"):
                page.get_by_text(part, exact=True).first.click()  # folds it up: the metrics move into sight
            comparison = page.inner_text("body")
            page.screenshot(path=pictures / "mlflow-comparison.png")
        finally:
            browser.close()
    return table, comparison


def test_the_variants_are_selected_and_compared_by_their_metrics(served, tmp_path):
    table, comparison = compare(*served, tmp_path)
    for metric in METRICS:
        assert metric in table, table
    assert "21.35" in table, "the baseline's perplexity"
    # The comparison's own table makes only the rows in sight, the first ones by the alphabet.
    for word in (*NAMES, "compression_ratio", "nll_difference"):
        assert word in comparison, comparison
