"""The Colab notebook runs with the quickstart's config."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.long
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


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Function that runs the install cell in an empty folder; it returns what it would start."""
    notebook = nbformat.read(ROOT / "scripts/colab.ipynb", as_version=4)
    cell = [cell for cell in notebook.cells if cell.cell_type == "code"][1].source
    folder = tmp_path / "content"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("shutil.which", lambda name: None)
    for name in ("PYTHONPATH", "COLAB_TPU_ADDR", "TPU_NAME"):
        monkeypatch.delenv(name, raising=False)
    run = subprocess.run

    def start(repository=""):
        calls = []

        def recorded(call, **options):
            if call[1] == "-c":  # Whether jaxqat is installed is found out for real.
                return run(call, **options)
            calls.append(call)
            if call[0] == "git":
                upload(folder / call[-1])
            return None

        monkeypatch.setattr("subprocess.run", recorded)
        exec(compile(cell, "colab", "exec"), {"REPOSITORY": repository})
        return calls

    return start


def upload(folder):
    """Copy the parts of a checkout that tell it apart."""
    for name in ("jaxqat", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


@pytest.fixture
def bare_python(tmp_path, monkeypatch):
    """A Python without packages in the place of the notebook's."""
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    return sys.executable


def test_the_notebook_alone_clones_and_installs_the_repository(install, bare_python):
    clone, pip = install("https://example.org/jaxqat.git")
    assert clone == ["git", "clone", "--depth", "1", "https://example.org/jaxqat.git", "jaxqat"]
    # The clone in this folder can be imported from here, which is no installation.
    source = f"{Path.cwd() / 'jaxqat'}[train]"
    assert pip == [bare_python, "-m", "pip", "install", "--quiet", source]


@pytest.mark.parametrize("place", [".", "jaxqat"])
def test_an_uploaded_checkout_is_installed(install, bare_python, place, monkeypatch):
    upload(Path(place))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert install() == [
        [bare_python, "-m", "pip", "install", "--quiet", f"{Path(place).resolve()}[train,cuda]"]
    ]


def test_an_installed_package_is_used_as_it_is(install, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert install() == []
    assert install("https://example.org/jaxqat.git") == []


def test_the_notebook_alone_without_an_address_says_what_it_needs(install, bare_python):
    with pytest.raises(SystemExit, match="give the address of its repository in REPOSITORY"):
        install()
