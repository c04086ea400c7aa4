"""The pages in a browser, at the widths of a phone, a tablet and a desktop."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from browser import Tab, chromium, find_chromium
from pipeline.report.made_up import analysis as made_up

from jaxqat.pipeline.report import analysis, html, write_analysis, write_report
from jaxqat.pipeline.report.gallery import data_url

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium here")

WIDTHS = pytest.mark.parametrize("width", [390, 768, 1280])
LONG = "encoder/stage3/block12/attention/shortcut_projection_conv"

# Elements that are wider than what holds them, and tables that only scrolling shows whole.
CUT = """[...document.querySelectorAll("html, .scroll, figure, .cards li")]
  .filter(each => each.scrollWidth > each.clientWidth).map(each => each.outerHTML.slice(0, 80))"""


@pytest.fixture(autouse=True)
def one_picture(monkeypatch):
    """Save the seconds for drawing: every figure is one picture."""
    url = data_url(np.zeros((300, 200, 3), np.uint8))
    for module in (html, analysis):
        monkeypatch.setattr(module, "draw_all", lambda names: ({}, dict.fromkeys(names, [url] * 2)))
    monkeypatch.setattr(html.figures, "draw_samples", lambda *data: b"")


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with chromium() as tab:
        yield tab


@WIDTHS
def test_no_column_of_a_report_is_cut(tab, write_run, width):
    workdir = write_run(fp32_epochs=2, qat_epochs=1, deployed=True)
    path = workdir / "results.json"
    path.write_text(path.read_text().replace("stage2/block0/shortcut_conv", LONG))
    tab.open(write_report(workdir).as_uri(), width=width)

    assert LONG in tab.evaluate("document.body.innerText")
    assert tab.evaluate(CUT) == []
    assert tab.problems == []


@WIDTHS
def test_no_column_of_an_analysis_is_cut(tab, tmp_path, width):
    found = made_up()
    layers = (replace(found.layers[0], path=LONG), *found.layers[1:])
    rows = (*found.sensitivity[:-1], replace(found.sensitivity[-1], path=LONG))
    found = replace(found, layers=layers, sensitivity=rows)
    tab.open(write_analysis(tmp_path, found).as_uri(), width=width)

    assert LONG in tab.evaluate("document.body.innerText")
    assert tab.evaluate(CUT) == []


def test_a_row_of_a_table_is_a_block_with_its_headings_on_a_phone(tab, write_run):
    page = write_report(write_run(fp32_epochs=2, qat_epochs=1)).as_uri()
    label = "getComputedStyle(document.querySelector('td[data-label]'), '::before').content"
    tab.open(page, width=390)
    assert tab.evaluate(label) == '"Source"'
    tab.open(page, width=1280)
    assert tab.evaluate(label) == "none"


def test_a_printed_page_shows_closed_parts_and_plain_tables(tab, write_run):
    tab.open(write_report(write_run(fp32_epochs=2, qat_epochs=1)).as_uri())
    height = "document.querySelector('details:not([open])').getBoundingClientRect().height"
    tab.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert tab.evaluate(height) > 100
        assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        tab.call("Emulation.setEmulatedMedia", media="")
    assert tab.evaluate(height) < 50  # The line to open it.
