"""The UI as a person uses it: a real browser selects the variants and opens their comparison."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import test_tracking
from test_tracking import to, view_path
from variant_records import four

from quantline.toolchains import end_group

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
    """The address of the UI as `make ui` starts it, and the experiment's id, of a store with four variants."""
    experiment = to(store, four(store / "work")).experiment_id
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    variables = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = (store / "ui.log").open("w")
    process = subprocess.Popen(command, cwd=store, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (store / "ui.log").read_text()
                assert time.monotonic() < deadline, (store / "ui.log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", experiment
    finally:
        end_group(process)
        log.close()


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
            table = page.inner_text("body")
            page.screenshot(path=pictures / "mlflow-variants.png")
            page.get_by_role("checkbox", name="Select all runs").click()
            page.get_by_role("button", name="Compare", exact=True).click()
            page.get_by_text(f"Comparing {len(NAMES)} Runs from 1 Experiment").wait_for()
            row = page.get_by_text("reference_perplexity", exact=True).last
            row.wait_for()
            row.scroll_into_view_if_needed()
            comparison = page.inner_text("body")
            page.screenshot(path=pictures / "mlflow-comparison.png")
        finally:
            browser.close()
    return table, comparison


def test_the_variants_are_selected_and_compared_by_their_metrics(served, tmp_path):
    table, comparison = compare(*served, tmp_path)
    for metric in METRICS:
        assert metric in table, table
    for word in (*NAMES, *METRICS):
        assert word in comparison, comparison
    assert "21.35" in table, "the baseline's perplexity"
    assert "21.35" in comparison, comparison
