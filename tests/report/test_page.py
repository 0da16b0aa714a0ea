"""The page as a browser shows it, with no network: drawn, readable, and no wider than its window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import report_records

from quantline.config.report import ReportConfig
from quantline.report.build import build

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]

# For each drawing: how many shapes it has, and how many of those cover no area and no length.
DRAWN = """svg => svg.map(one => {
  const shapes = [...one.querySelectorAll('path, use, rect')].filter(shape => !shape.closest('defs, clipPath'));
  const boxes = shapes.map(shape => shape.getBoundingClientRect()).filter(box => box.width > 0 || box.height > 0);
  return {name: one.querySelector('title').textContent, shown: boxes.length, width: one.getBoundingClientRect().width};
})"""


@pytest.fixture(scope="module")
def address(rules: ReportConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    names = ["awq-w4-g128", "gptq-w8-g128", "gptq-w2-g128"]
    records = report_records.records(folder, names=names, gpu=True)
    report_records.choose(records[2], folder / "artifacts")
    build(records, folder / "artifacts", rules, folder / "report")
    return (folder / "report" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        yield started
        started.close()


@pytest.fixture(scope="module", params=[(1200, "light"), (400, "dark")], ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    context.set_default_timeout(120_000)
    opened = context.new_page()
    opened.said, opened.asked = [], []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(address)
    yield opened
    context.close()


def test_the_page_makes_no_requests_and_logs_nothing_to_the_console(page: Any, address: str) -> None:
    assert [url for url in page.asked if not url.startswith("data:")] == [address]
    assert page.said == []


def test_every_plot_is_drawn(page: Any) -> None:
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true })")
    found = page.eval_on_selector_all("svg", DRAWN)
    titles = " ".join(one["name"] for one in found)
    for part in ("Quality against size", "Distances", "Output error by layer", "What one linear", "Throughput and latency",
                 "Speed-up", "Memory", "Loss of each unit by width", "float model's score", "ran"):  # fmt: skip
        assert part in titles
    for one in found:
        assert one["shown"] > 15, one
        assert one["width"] > 300, one


def test_drawings_use_only_colours_of_the_theme(page: Any) -> None:
    unset = """all => all.flatMap(one => [...one.getAttribute('style').matchAll(/var\\((--[\\w-]+)\\)/g)].map(m => m[1]))
      .filter(name => !getComputedStyle(document.documentElement).getPropertyValue(name))"""
    assert page.eval_on_selector_all("svg [style]", unset) == []


def test_it_is_no_wider_than_the_window(page: Any) -> None:
    wide = "[document.documentElement.scrollWidth, document.body.scrollWidth, document.documentElement.clientWidth]"
    root, body, window = page.evaluate(wide)
    assert root <= window
    assert body <= window


def test_tables_have_rows_and_headings_that_screen_readers_tell(page: Any) -> None:
    found = page.eval_on_selector_all(
        "table", "all => all.map(one => [one.id, one.tBodies[0].rows.length, one.querySelectorAll('th[scope]').length])"
    )
    assert {name for name, *_ in found} >= {
        f"table-{name}" for name in ("variants", "quality", "tasks", "worst_layers", "restored", "speed", "memory",
                                     "alarms", "protocol", "commands", "fingerprints")
    }  # fmt: skip
    for name, rows, headings in found:
        assert rows > 0, name
        assert headings > rows, name


def test_what_scrolls_can_be_reached_by_the_keyboard_and_has_a_name(page: Any) -> None:
    hidden = """all => all.filter(one => one.scrollWidth > one.clientWidth &&
      !(one.tabIndex === 0 && one.getAttribute('aria-label'))).map(one => one.className)"""
    assert page.eval_on_selector_all(".scroll, .drawing", hidden) == []


def test_text_stands_out_from_its_ground(page: Any) -> None:
    contrast = """() => {
      const light = text => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
      const ground = one => { for (; one; one = one.parentElement) { const c = getComputedStyle(one).backgroundColor;
        if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
      const poor = [];
      for (const one of document.querySelectorAll('p, li, dd, dt, td, th, h1, h2, h3, figcaption, a, .chip, .missing')) {
        if (!one.textContent.trim()) continue;
        const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(one.tagName + ' ' + one.className + ' ' + one.textContent.slice(0, 30));
      }
      return [...new Set(poor)]; }"""
    assert page.evaluate(contrast) == []


@pytest.fixture(scope="module")
def usual(browser: Any, address: str) -> Iterator[Any]:
    """The page in a window of 1400 pixels, nothing opened."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    context.set_default_timeout(120_000)
    opened = context.new_page()
    opened.goto(address)
    yield opened
    context.close()


def test_the_main_table_fits_a_window_of_1400_pixels(usual: Any) -> None:
    wide = "box => [box.scrollWidth, box.clientWidth]"
    found, room = usual.eval_on_selector(".scroll:has(#table-variants)", wide)
    assert found <= room
    usual.eval_on_selector(
        "#table-variants tbody th", "cell => { cell.textContent = 'gptq-w4-g128-' + 'calibration-'.repeat(4) }"
    )
    found, room = usual.eval_on_selector(".scroll:has(#table-variants)", wide)
    assert found <= room


def test_long_tables_are_folded_and_the_main_ones_are_not(usual: Any) -> None:
    rows = "all => all.map(one => [one.id, one.tBodies[0].rows.length, one.closest('details:not([open])') !== null])"
    found = {name: (count, folded) for name, count, folded in usual.eval_on_selector_all("table", rows)}
    for name, (count, folded) in found.items():
        assert folded or count <= 12, name
    assert found["table-protocol"][1]
    assert not found["table-variants"][1]
    assert not found["table-quality"][1]


def test_what_is_folded_is_printed(usual: Any) -> None:
    seen = "cell => cell.checkVisibility()"
    assert not usual.eval_on_selector("#table-protocol tbody tr:last-child td", seen)
    usual.emulate_media(media="print")
    assert usual.eval_on_selector("#table-protocol tbody tr:last-child td", seen)
    usual.emulate_media(media="screen")
