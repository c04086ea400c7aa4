"""The command `analyze` on a run."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_run import STEPS, files, run_command

from jaxqat import cli
from jaxqat.cli import dispatch
from jaxqat.commands import analyze as diagnosis
from jaxqat.commands import quantize, train
from jaxqat.errors import InputError
from jaxqat.pipeline.data import DataError, load_dataset
from jaxqat.pipeline.measurements import RunAnalysis
from jaxqat.pipeline.results import read
from jaxqat.pipeline.run.folder import RunFolderError

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console, finished, no_report = tiny_run.console, tiny_run.finished, tiny_run.no_report

LAYERS = ["stem_conv", "block_conv", "head"]


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of a finished run, which the test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def unpainted(monkeypatch):
    """Skip drawing, which takes seconds."""
    monkeypatch.setattr(diagnosis, "write_analysis", lambda folder, result: folder / "page")
    monkeypatch.setattr(diagnosis, "write_report", lambda folder: folder / "page")


def test_the_command_writes_data_and_page_and_nothing_else(
    run, small_network, console, monkeypatch
):
    monkeypatch.setattr(dispatch, "Console", lambda **_: console)
    before = files(run)
    assert cli.main(["analyze", str(run)]) == dispatch.DONE
    after = files(run)
    assert {name for name in after if after[name] != before.get(name)} == {
        "analysis.json",
        "analysis.html",
        "report.html",  # It links to the analysis now.
    }
    assert "analysis.html" in (run / "report.html").read_text()
    found = json.loads((run / "analysis.json").read_text())
    assert [layer["path"] for layer in found["layers"]] == LAYERS
    assert (found["stage"], found["split"], found["step"]) == ("qat", "test", STEPS)
    shown = console.file.getvalue()
    assert "\nanalyzing 40 images, layer by layer\n" in shown
    assert all(name in shown for name in (*LAYERS, "analysis.html"))
    assert (run / "analysis.html").read_text().count("<img") == 3
    # What was analyzed is the trained network, on the test images.
    results = json.loads((run / "results.json").read_text())
    assert found["examples"] == 40
    assert found["quantized"]["accuracy"] == results["qat"]["test"]["accuracy"]
    sensitive = {row["path"]: row for row in found["sensitivity"]}
    assert set(sensitive) == set(LAYERS)


def test_the_post_training_network_is_that_of_fp32_before_fine_tuning(
    run, small_network, console, unpainted
):
    found = diagnosis.analyze(run, stage="ptq", console=console)
    results = json.loads((run / "results.json").read_text())
    assert found.real.accuracy == results["fp32"]["test"]["accuracy"]
    assert found.quantized.accuracy == results["ptq"]["int8"]["test"]["accuracy"]
    assert read(run / "analysis.json", RunAnalysis, error=RunFolderError) == found


def test_the_post_training_network_is_that_of_the_recipe_it_was_made_with(
    run, small_network, console, unpainted, monkeypatch
):
    monkeypatch.setattr(quantize, "write_report", lambda path: path)  # Spares seconds.
    results = quantize.quantize(run, recipe="w4a8", batches=1, console=console)
    found = diagnosis.analyze(run, stage="ptq", recipe="w4a8", console=console)
    assert [layer.weight_bits for layer in found.layers] == [4, 4, 4]
    assert (found.recipe["weight_bits"], found.calibration_batches) == (4, 1)
    # The very network that `verify --stage ptq` finds equal to RUN/ptq, code by code.
    assert found.quantized.accuracy == results.ptq["w4a8"].test.accuracy


def test_a_run_without_an_integer_network_of_ptq_is_calibrated_by_its_config(
    run, small_network, console, unpainted
):
    before = diagnosis.analyze(run, stage="ptq", console=console)
    shutil.rmtree(run / "ptq")
    after = diagnosis.analyze(run, stage="ptq", console=console)
    assert dataclasses.replace(after, environment=before.environment) == before


def test_a_run_with_dynamic_ranges_has_a_page(tmp_path, small_network, console, no_report):
    run = tmp_path / "run"
    changes = {"quant__act_range": "dynamic", "quant__activations": "symmetric"}
    train.train(tiny_run.tiny(**changes, fp32__epochs=1, qat__epochs=1), run, console=console)
    assert run_command("analyze", run) == dispatch.DONE
    found = json.loads((run / "analysis.json").read_text())
    assert found["tensors"] == [] and [layer["path"] for layer in found["layers"]] == LAYERS
    page = (run / "analysis.html").read_text()
    assert page.count("<img") == 2 and "Inputs and their ranges" not in page


def test_images_are_counted_from_the_first_of_the_split(run, small_network, console, unpainted):
    found = diagnosis.analyze(run, split="train", images=7, console=console)
    assert found.examples == 7 and "7 images of the train split" in console.file.getvalue()
    pixels = next(t for t in found.tensors if t.name == "stem_conv/input")
    assert pixels.values == 7 * 8 * 8
    # Of these images, and of no others: in the units of the input, the ends are so far apart.
    data = load_dataset(tiny_run.tiny().data)
    ends = (float(np.max(data.train.images[:7])), float(np.min(data.train.images[:7])))
    spread = (ends[0] - ends[1]) / 255 / data.std[0]
    assert pixels.largest - pixels.smallest == pytest.approx(spread, rel=1e-5)


def test_a_run_that_was_never_quantized_is_named(run, small_network, console):
    shutil.rmtree(run / "checkpoints" / "qat")
    with pytest.raises(RunFolderError, match="there are no checkpoints of qat"):
        diagnosis.analyze(run, console=console)
    assert cli.main(["analyze", str(run)]) == dispatch.BAD_INPUT
    assert not list(run.glob("analysis*"))


def test_a_number_of_images_below_one_is_refused(run, console):
    with pytest.raises(InputError, match="--images must be 1 or more, got 0"):
        diagnosis.analyze(run, images=0, console=console)


def test_a_split_that_the_run_has_not_is_named(run, small_network, console):
    with pytest.raises(DataError, match="no validation split"):
        diagnosis.analyze(run, split="validation", console=console)


def test_a_network_without_quantized_layers_is_named(tmp_path, small_network, console, no_report):
    float_run = tmp_path / "run"
    rules = [{"weight_bits": None, "act_bits": None}]
    settings = tiny_run.tiny(quant__rules=rules, fp32__epochs=1, qat__epochs=1)
    train.train(settings, float_run, console=console)
    assert cli.main(["analyze", str(float_run)]) == dispatch.BAD_INPUT
    assert not list(float_run.glob("analysis*"))
