"""The documentation as a person reads it: built, opened in a real browser, searched. No request may leave the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MILLISECONDS = 120_000  # a page may take as long on a busy machine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def mkdocs(root):
    """The command that builds the site, in its own environment."""
    subprocess.run(["make", "-s", ".venvs/docs/ready"], cwd=root, check=True)
    return [str(root / ".venvs" / "docs" / "bin" / "python"), "-m", "mkdocs", "build", "--strict"]


@pytest.fixture(scope="module")
def site(root, mkdocs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([*mkdocs, "-d", str(folder)], cwd=root, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """A page, what it asked for, and what it complained of."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(MILLISECONDS)
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    yield page, requests, complaints
    page.close()


def outside(requests: list[str], *allowed: str) -> list[str]:
    return [url for url in requests if not url.startswith((*allowed, "data:", "blob:"))]


def test_every_page_of_the_menu_opens_with_a_heading_and_asks_nobody_else(opened, address):
    page, requests, complaints = opened
    page.goto(f"{address}/index.html")
    links = page.eval_on_selector_all(".md-nav--primary a.md-nav__link[href]", "all => all.map(one => one.href)")
    pages = sorted({link.partition("#")[0] for link in links})
    assert len(pages) >= 30
    for url in pages:
        answer = page.goto(url)
        assert answer is not None, url
        assert answer.ok, url
        assert page.locator("article h1").inner_text().strip("¶ \n"), url
        broken = page.eval_on_selector_all(
            "article img", "all => all.filter(one => !one.naturalWidth).map(one => one.src)"
        )
        assert broken == [], url
    assert outside(requests, address) == []
    assert complaints == []


def test_the_search_finds_an_option_and_leads_to_it(opened, address):
    page, requests, complaints = opened
    page.goto(f"{address}/index.html")
    page.locator("input.md-search__input").click()
    page.keyboard.type("damp_percent", delay=20)
    found = page.locator(".md-search-result__link[href*='reference/options.html']").first
    found.wait_for()
    found.click()
    page.wait_for_url("**/reference/options.html*")
    assert page.locator("article h1").inner_text().startswith("Every option")
    assert outside(requests, address) == []
    assert complaints == []


def test_a_page_opens_from_the_file_system_too(opened, site):
    page, requests, _ = opened
    page.goto(f"file://{site}/index.html")
    page.get_by_role("link", name="Quick start").first.click()
    page.wait_for_url("**/guide/quick-start.html")
    assert page.locator("article h1").inner_text().startswith("Quick start")
    assert outside(requests, "file://") == []


def test_a_broken_link_and_a_page_outside_the_menu_end_the_build(root, mkdocs, tmp_path):
    for name in ("docs", "tools"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copy(root / "mkdocs.yml", tmp_path)
    (tmp_path / "docs" / "lost.md").write_text(
        "# Lost\n\n[gone](gone.md) [there](index.md#nowhere)\n", encoding="utf-8"
    )
    done = subprocess.run(mkdocs, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    for what in ("lost.md", "gone.md", "nowhere"):
        assert what in done.stderr
