"""Output for programs: `--json`, `--version`; and shorter output: `--images`, `--summary`."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_run
from tiny_run import run_command

import jaxqat
from jaxqat.lowering import lowering_table

pytestmark = pytest.mark.slow

small_network, finished = tiny_run.small_network, tiny_run.finished


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(
    ("command", "file", "key"),
    [
        (("evaluate",), "evaluations/integer_test.json", "metrics"),
        (("evaluate", "--stage", "ptq"), "evaluations/ptq_int8_test.json", "recipe"),
        (("verify",), "evaluations/verify_test.json", "codes"),
        (("analyze", "--images", "8"), "analysis.json", "layers"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_json_on_standard_output_is_the_content_of_the_file(
    run, small_network, capsys, command, file, key
):
    name, *options = command
    assert run_command(name, run, *options, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found == json.loads((run / file).read_text()) and key in found
    assert "images" in err  # What people read goes to standard error.


def test_verify_takes_the_first_images_of_a_split(run, small_network, capsys):
    assert run_command("verify", run, "--images", 7, "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 7
    assert run_command("verify", run, "--images", 1000, "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 40
    assert run_command("verify", run, "--images", 0) == 2
    assert "--images must be 1 or more, got 0" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    assert run_command("--version") == 0
    assert capsys.readouterr().out == f"jaxqat {jaxqat.__version__}\n"


def test_a_summary_of_kernels_fits_80_columns_and_counts_all_of_them(finished, monkeypatch, capsys):
    from jaxqat.commands import lowering

    compiled = []
    monkeypatch.setattr(
        lowering, "compile_for", lambda *a, f=lowering.compile_for, **k: compiled.append(f(*a, **k))
        or compiled[0],
    )  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--target", "cpu", "--batch_size", 4, "--summary")
    assert run_command("lowering", finished, *options) == 0
    table = capsys.readouterr().out.split("products:")[0]
    assert max(map(len, table.splitlines())) <= 80
    rows = [line.split("│")[1:-1] for line in table.splitlines() if line.startswith("│")]
    counts = [int(cells[2].replace(",", "")) for cells in rows if cells[2].strip()]
    expected = lowering_table(compiled[0])
    assert sum(counts) == len(expected.rows) > len(counts)
    assert len(counts) == len({(row.what, row.products, row.is_float) for row in expected.rows})
