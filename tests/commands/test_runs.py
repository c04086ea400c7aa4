"""`jaxqat runs`: a table of the runs in a folder."""

import shutil

import pytest
import tiny_run
from tiny_run import run_command

from jaxqat.commands.runs import runs
from jaxqat.pipeline.run.folder import RunFolder

pytestmark = pytest.mark.slow

console, finished = tiny_run.console, tiny_run.finished


@pytest.fixture
def folder(finished, tmp_path):
    """A folder with a finished run, one that was stopped in QAT, a fresh and a damaged one."""
    ignored = shutil.ignore_patterns("checkpoints", "figures")
    for name in ("a/finished", "b_stopped", "c_fresh", "d_damaged", "e_moved"):
        shutil.copytree(finished, tmp_path / name, ignore=ignored)
    for name in ("b_stopped", "c_fresh"):
        (tmp_path / name / "results.json").unlink()
    RunFolder(tmp_path / "b_stopped").truncate_metrics("qat", 6)
    (tmp_path / "c_fresh" / "metrics.jsonl").unlink()
    (tmp_path / "d_damaged" / "results.json").write_text("{")
    shutil.rmtree(tmp_path / "e_moved" / "integer")
    return tmp_path


def test_every_run_has_a_row_with_state_accuracies_and_size(folder, finished, console):
    before = tiny_run.files(folder)
    rows = {str(row.path): row for row in runs(folder, console=console)}
    results = RunFolder(finished).read_results()
    assert list(rows) == ["a/finished", "b_stopped", "c_fresh", "d_damaged", "e_moved"]
    row = rows["a/finished"]
    networks = (results.fp32, results.qat, results.integer)
    assert row.accuracies == tuple(network and network.test.accuracy for network in networks)
    assert (row.state, row.size_bytes) == ("finished", results.size_bytes.integer)
    assert rows["b_stopped"].state == "qat, epoch 1 of 2"
    assert rows["c_fresh"].state == "not trained yet"
    assert rows["c_fresh"].accuracies == (None, None, None)
    assert rows["e_moved"].state == "finished, without integer/"
    assert rows["d_damaged"].state.startswith("damaged: ")
    assert "results.json" in rows["d_damaged"].state
    shown = console.file.getvalue()
    assert f"{100 * results.fp32.test.accuracy:.2f}" in shown
    assert f"{results.size_bytes.integer:,}" in shown
    assert tiny_run.files(folder) == before


def test_the_table_fits_a_terminal_of_80_columns(folder, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command("runs", folder / "a") == 0
    shown = capsys.readouterr().out
    assert "finished" in shown and max(map(len, shown.splitlines())) <= 80


def test_a_folder_without_runs_is_an_error(tmp_path, capsys):
    for path, reason in ((tmp_path, "holds no run folder"), (tmp_path / "x", "does not exist")):
        assert run_command("runs", path) == 2
        assert f"{path}: {reason}" in capsys.readouterr().err
    assert run_command("runs") == 2
    assert "the folder of runs" in capsys.readouterr().err
