"""Names that a person chose are shown as they are: they hold brackets, dollars or escapes."""

import dataclasses
import shutil

import numpy as np
import pytest
import tiny_run
from tiny_run import run_command, tiny

from jaxqat.commands import train
from jaxqat.commands.export import export
from jaxqat.commands.report import report
from jaxqat.pipeline.config import to_yaml
from jaxqat.pipeline.report.figures import draw_samples
from jaxqat.pipeline.report.samples import choose_samples
from jaxqat.pipeline.report.theme import LIGHT
from jaxqat.pipeline.terminal import say

pytestmark = pytest.mark.slow

console, finished = tiny_run.console, tiny_run.finished

ODD_NAMES = ("[/nope]", "x[old]", "[bold]", ":x:")


@pytest.fixture
def odd(finished, tmp_path):
    """A finished run whose name and folder hold what Rich reads as markup."""
    run = tmp_path / "x[old]" / "[" / "nope]"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    experiment = dataclasses.replace(tiny(), name="[/nope]")
    (run / "config.yaml").write_text(to_yaml(experiment))
    results = (run / "results.json").read_text()
    (run / "results.json").write_text(results.replace('"tiny"', '"[/nope]"'))
    return run


def test_a_finished_run_with_brackets_in_its_name_and_folder_is_shown(odd, console):
    train.train(dataclasses.replace(tiny(), name="[/nope]"), odd, console=console)
    shown = console.file.getvalue()
    assert f"{odd}: this run is finished" in shown
    assert "[/nope]: digits, test split" in shown


def test_report_and_export_print_their_paths_as_they_are(odd, console, capsys):
    assert report(odd, console=console) == odd / "report.html"
    output = odd / "[red]net.onnx"
    export(odd, output, format="onnx", console=console)
    lines = console.file.getvalue().splitlines()
    assert lines[1] == f"report: {odd / 'report.html'}"
    assert lines[2] == f"writing {output}" and lines[3].startswith(f"{output}: ")
    assert run_command("evaluate", odd / "[/b]") == 2
    assert str(odd / "[/b]") in capsys.readouterr().err


def test_control_characters_and_lone_surrogates_are_escaped(console):
    say("\x1b[2Jcafé\udcff\r", console)
    assert ascii(console.file.getvalue()) == ascii("\\x1b[2Jcafé\\udcff\\r\n")


@pytest.mark.parametrize("name", ["$\\frac$", "cash $ and $ {", *ODD_NAMES])
def test_a_figure_shows_a_class_name_that_is_no_formula(name):
    images, labels = np.zeros((1, 4, 4, 1), np.uint8), np.zeros(1, int)
    samples = choose_samples(images, labels, (name,), {"FP32": np.zeros((1, 1))})
    assert draw_samples(samples, theme=LIGHT).startswith(b"\x89PNG")
