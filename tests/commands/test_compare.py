"""`jaxqat compare`: one page over several runs, whose numbers are those of their files."""

import json
import re
import shutil

import numpy as np
import pytest
import tiny_run
from tiny_run import run_command

from jaxqat.pipeline.report import ReportError, comparison, write_comparison
from jaxqat.pipeline.run.folder import RunFolder

pytestmark = pytest.mark.slow

finished = tiny_run.finished


@pytest.fixture
def runs(finished, tmp_path):
    """A run, and a copy of it with a few test images in other classes and another accuracy."""
    ignored = shutil.ignore_patterns("checkpoints", "figures", "ptq", "integer")
    folders = [tmp_path / name for name in ("a/run", "b/run")]
    for folder in folders:
        shutil.copytree(finished, folder, ignore=ignored)
    path = folders[1] / "results.json"
    content = json.loads(path.read_text())
    test = content["integer"]["test"]
    matrix = np.array(test["confusion_matrix"])
    true = int(matrix.diagonal().argmax())
    taken = (true + 1) % len(matrix)
    matrix[true, true] -= 2
    matrix[true, taken] += 2
    test["confusion_matrix"] = matrix.tolist()
    test["accuracy"] = matrix.trace() / matrix.sum()
    path.write_text(json.dumps(content))
    return folders, true, taken


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_the_page_has_every_network_its_change_and_the_confusions_that_changed(runs, capsys):
    folders, true, taken = runs
    page = folders[0].parent / "page.html"
    figures = page.with_name("figures")
    assert run_command("compare", *folders, "--output", page, "--figures", figures) == 0
    assert {path.stem for path in figures.iterdir()} == {
        *("sizes", "speeds", "curves_fp32", "curves_qat", "f1", "confusion_1")
    }
    assert f"comparison: {page}" in capsys.readouterr().out
    results = [RunFolder(folder).read_results() for folder in folders]
    tests = [each.integer.test for each in results if each.integer is not None]
    text = text_of(page.read_text())
    change = 100 * (tests[1].accuracy - tests[0].accuracy)
    for name, result in zip(("a/run", "b/run"), results, strict=True):
        for network in result.tested():
            assert f"{name}: {network.name} {100 * network.test.accuracy:.2f}" in text
    last = f"b/run: {list(results[1].tested())[-1].name}"
    accuracy = f"{100 * tests[1].accuracy:.2f}"
    shown = f"{change:+.2f}".replace("-", "−")
    assert f"{last} {accuracy} {shown} {results[1].size_bytes.integer:,}" in text
    names = [each.name for each in results[0].fp32.test.per_class]
    before = tests[0].confusion_matrix[true][taken]
    assert f"{names[true]} taken for {names[taken]}: {before} to {before + 2} (+2)" in text
    assert "<script" not in page.read_text()


def test_an_existing_page_is_kept_unless_told(runs, capsys):
    folders, *_ = runs
    page = folders[0].parent / "page.html"
    page.write_text("mine")
    assert run_command("compare", *folders, "--output", page) == 2
    assert f"{page}: already exists" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert run_command("compare", *folders, "--output", page, "--overwrite") == 0
    assert page.read_text().startswith("<!doctype html>")


def test_what_cannot_be_compared_is_refused_by_name(runs, tmp_path, capsys):
    folders, *_ = runs
    page = tmp_path / "page.html"
    assert run_command("compare", folders[0], "--output", page) == 2
    assert "a comparison needs two runs or more, got 1." in capsys.readouterr().err
    with pytest.raises(ReportError, match="a run is given twice"):
        write_comparison([folders[0], folders[0]], page)
    path = folders[1] / "results.json"
    content = json.loads(path.read_text())
    content["data"]["sha256"]["test"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match=r"a/run and b/run were tested on.*SHA-256"):
        write_comparison(folders, page)
    path.unlink()
    with pytest.raises(ReportError, match=r"b/run/results.json"):
        write_comparison(folders, page)
    assert not page.exists()


def test_a_shared_fp32_network_is_shown_once(runs):
    folders, *_ = runs
    path = folders[1] / "results.json"
    content = json.loads(path.read_text())
    content["fp32"]["from_run"] = {"name": "run", "config_hash": "0" * 64}
    path.write_text(json.dumps(content))
    named = [
        comparison.Named(name, comparison.read_run(folder))
        for name, folder in zip("ab", folders, strict=True)
    ]
    for shown, owner in ((named, "a"), (named[1:], "b")):
        points = comparison._points(shown)
        assert [p.name for p in points if p.name.endswith("FP32")] == [f"{owner}: FP32"]
        curves = comparison._drawings(shown)["curves_fp32"]
        assert list(curves.args[1]) == [owner]
