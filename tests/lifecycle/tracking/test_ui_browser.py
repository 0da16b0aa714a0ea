"""The UI as a person uses it: a real browser selects the variants and opens their comparison."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from mlflow_server import running
from variant_records import four

import tests.lifecycle.tracking.test_writer as test_tracking
from quantline.lifecycle.tracking.searches import publish_plan
from quantline.lifecycle.tracking.store import resolve_uri
from quantline.lifecycle.tracking.view import CHARTS, COLUMNS, SEARCH_COLUMNS, VIEW_SEARCHES, view_path
from quantline.report.choice import write_search
from tests.lifecycle.tracking.test_writer import to
from tests.planning.test_search_record import record as a_search

database, store = test_tracking.database, test_tracking.root  # fixtures
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NAMES = ("float", "awq-w4-g128", "gptq-w4-g128", "gptq-w8-g128")
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
    records = four(store / "work")
    for result in (result for record in records for result in record.results if result["stage"] == "evaluate"):
        result["metrics"]["kl_divergence"] = 0.0261258
    experiment = to(store, records, report=folder).experiment_id
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running(store, port, "ui"):
        yield f"http://127.0.0.1:{port}", experiment


def compare(address: str, experiment: str, pictures: Path) -> tuple[list[tuple[str, bool]], str, str]:
    """Open the table of variants at 1400 px, select all, open their comparison.

    Returns:
        the table's headings and whether each is in sight, from left to right; the texts of both pages.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1400, "height": 720})
            page.set_default_timeout(MILLISECONDS)
            page.goto(f"{address}/#{view_path(experiment)}")
            for name in NAMES:
                page.get_by_role("link", name=name, exact=True).wait_for()
            if (assistant := page.get_by_role("button", name="Close", exact=True)).count():
                assistant.click()  # MLflow's, which takes a quarter of the page
            page.get_by_text(list(COLUMNS)[-1], exact=True).wait_for()
            headings = page.locator(".ag-header-viewport [col-id^='tags']").evaluate_all(
                "found => found.map(one => [one.getBoundingClientRect().left, one.innerText.trim(),"
                " one.getBoundingClientRect().right <= one.closest('.ag-header-viewport').getBoundingClientRect().right])"
            )
            table = page.inner_text("body")
            page.screenshot(path=pictures / "mlflow-variants.png")
            page.set_viewport_size({"width": 1900, "height": 720})
            page.get_by_role("checkbox", name="Select all runs").click()
            page.get_by_role("button", name="Compare", exact=True).click()
            page.get_by_text(f"Comparing {len(NAMES)} Runs from 1 Experiment").wait_for()
            page.get_by_text("2 size/size_mb", exact=True).last.wait_for()
            for part in ("Visualizations", "Parameters"):
                page.get_by_text(part, exact=True).first.click()  # folds it up: the metrics move into sight
            comparison = page.inner_text("body")
            page.screenshot(path=pictures / "mlflow-comparison.png")
        finally:
            browser.close()
    return [(text, bool(seen)) for _, text, seen in sorted(headings)], table, comparison


def charts(address: str, experiment: str) -> str:
    """The text of the page of charts, once the charts that matter are there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.set_default_timeout(MILLISECONDS)
            page.goto(f"{address}/#{view_path(experiment)}&compareRunsMode=CHART")
            page.get_by_text("3 serving/tok_s", exact=True).first.wait_for()
            return page.inner_text("[data-testid='experiment-view-compare-runs-chart-area']")
        finally:
            browser.close()


def test_charts_that_matter_come_first_and_the_others_are_folded(served):
    text = charts(*served)
    assert text.split("\n")[:2] == [CHARTS, "(4)"], text
    assert "2 size/size_mb vs. 1 quality/change_percent" in text
    assert "\ndownload\n(" in text, "the section of the others"
    assert "linears_quantized" not in text, "a chart of another section"


def test_the_variants_are_compared_in_readable_columns_and_by_the_figures_first(served, tmp_path):
    headings, table, comparison = compare(*served, tmp_path)
    assert headings == [(name, True) for name in COLUMNS]
    for text in ("+1.24 % [+0.99, +1.55]", "2.50 MB", "1.32x", "baseline"):
        assert text in table, table
    # The comparison's own table makes only the rows in sight, the first ones by name.
    for word in (*NAMES, "1 quality/change_percent", "2 size/size_mb", "3 serving/speed_up"):
        assert word in comparison, comparison


def test_a_search_unfolds_its_candidates_with_state_figures_and_why(store, tmp_path):
    from playwright.sync_api import sync_playwright

    files, uri = write_search(a_search(), tmp_path), resolve_uri(None, store)
    experiment = publish_plan(a_search(), files, uri=uri, experiment="quantline/demo").experiment_id
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running(store, port, "ui"), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        page = browser.new_page(viewport={"width": 1400, "height": 720})
        page.set_default_timeout(MILLISECONDS)
        page.goto(f"http://127.0.0.1:{port}/#{view_path(experiment, VIEW_SEARCHES)}")
        page.get_by_role("link", name="search ").first.wait_for()
        page.locator(".ag-cell[col-id*='Run Name'] button").first.click()  # the plus sign
        page.get_by_role("link", name="rtn-6", exact=True).wait_for()
        shown = page.inner_text("body")
        browser.close()
    for text in ("+0.30 % [+0.20, +0.40]", "winner", "raced out", "pruned", "awq takes 4", *SEARCH_COLUMNS):
        assert text in shown, shown
    assert shown.index("rtn-6") < shown.index("rtn-5") < shown.index("awq-w8"), "the winner first"
