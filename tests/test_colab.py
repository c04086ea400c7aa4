"""The Colab notebook runs with the quickstart's config."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_trains_evaluates_and_shows_the_report(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "scripts/colab.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # A user would set CONFIG in the form; here it becomes a smaller experiment.
    assert 'CONFIG = "cifar10_resnet18"' in cells[0].source
    cells[0].source += f'\nCONFIG, RUN = "quickstart", {str(tmp_path / "run")!r}'
    trained = 'options = [] if CONFIG == "quickstart"'
    assert trained in cells[2].source
    cells[2].source = cells[2].source.replace(
        trained, 'options = ["--fp32.epochs", "2", "--qat.epochs", "1"] if CONFIG == "quickstart"'
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "scripts")}}
    )
    client.execute()
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results["qat"]["test"]) >= {"accuracy", "precision", "recall", "f1"}
    assert {p.name for p in (tmp_path / "run/evaluations").iterdir()} == {
        "fp32_test.json",
        "qat_test.json",
    }
    shown = cells[-1].outputs[0]["data"]["text/html"]
    assert shown == (tmp_path / "run/report.html").read_text()


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(ROOT / "scripts/colab.ipynb", as_version=4)
    assert all(not c.outputs for c in notebook.cells if c.cell_type == "code")
