"""`jaxqat quantize`: post-training quantization of a run's FP32 network."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from integer.store.test_folder import content
from references import integer_graph
from tiny_run import STEPS, SmallNet, files, run_command, tiny

import jaxqat
from jaxqat.commands import evaluate, export, quantize, train, verify
from jaxqat.pipeline.data import epoch_permutation, load_dataset, normalize
from jaxqat.pipeline.integer_networks import load_network
from jaxqat.pipeline.metrics import classification_metrics
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.results import to_json
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import restore_model

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console, finished = tiny_run.console, tiny_run.finished


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def float_run(run) -> Path:
    """A run that was stopped between FP32 and QAT."""
    for name in ("integer", "ptq", "checkpoints/qat", "figures"):
        shutil.rmtree(run / name)
    for name in ("results.json", "report.html", "report_data.npz"):
        (run / name).unlink()
    RunFolder(run).truncate_metrics("qat", 0)
    return run


def recomputed(run: Path, batches: int = 2, recipe: str = "int8"):
    """Return network, logits and scores, computed with the public API from the FP32 checkpoint."""
    data = load_dataset(tiny().data)
    fp32 = restore_model(Networks.build(tiny(), data), RunFolder(run), "fp32")
    order = np.asarray(epoch_permutation(0, 0, len(data.train)))[: batches * 16].reshape(-1, 16)

    def prepare(images):
        return normalize(images, data.mean, data.std)

    network = jaxqat.calibrate(
        SmallNet(10), fp32.tree(), batches=[data.train.images[i] for i in order], recipe=recipe,
        preprocess=prepare, train=False,
    )  # fmt: skip
    image = jnp.zeros((1, 8, 8, 1))
    graph = jaxqat.convert(network, image, preprocess=prepare)
    _, logits = integer_graph.run(graph, data.test.images)
    scores = classification_metrics(data.test.labels, logits, [str(i) for i in range(10)])
    return graph, logits, to_json(scores)


def assert_ptq_is(run: Path, graph, logits, metrics, name="int8") -> None:
    """Assert that a run's PTQ network, its logits and its scores are these."""
    saved = jaxqat.load(run / "ptq" / name)
    assert [content(n) for n in saved.nodes] == [content(n) for n in graph.nodes]
    assert content(saved.tensors) == content(graph.tensors)
    _, found = integer_graph.run(saved, load_dataset(tiny().data).test.images)
    assert np.array_equal(found, logits)
    assert results_of(run)["ptq"][name]["test"] == metrics


def test_train_also_tests_the_calibrated_network(finished, small_network):
    assert_ptq_is(finished, *recomputed(finished))
    entry = results_of(finished)["ptq"]["int8"]
    assert (entry["calibration_batches"], entry["calibration_images"]) == (2, 32)
    assert entry["step"] == STEPS
    assert "verify" not in entry  # Only `quantize` verifies it.
    assert entry["size_bytes"] == jaxqat.load(finished / "ptq" / "int8").size_bytes()
    metadata = jaxqat.load(finished / "ptq" / "int8").metadata
    keys = ("stage", "ptq", "step", "calibration_batches")
    assert tuple(metadata[key] for key in keys) == ("ptq", "int8", STEPS, 2)


def test_the_command_needs_only_fp32_and_train_continues_from_there(
    finished, float_run, small_network, console, capsys, monkeypatch
):
    checkpoints = files(float_run / "checkpoints")
    assert run_command("quantize", float_run) == 0
    shown = capsys.readouterr().out
    calibrates, verifies = (
        "PTQ (int8): calibrating on 2 batches",
        "verifying every code on 40 images",
    )
    assert (
        shown.index("data: loading digits")
        < shown.index(calibrates)
        < shown.index(verifies)
        < shown.index("PTQ W8A8 (int8), integer")
    )
    assert "PTQ W8A8 (int8), integer" in shown
    assert_ptq_is(float_run, *recomputed(float_run))
    found, whole = results_of(float_run), results_of(finished)
    assert "qat" not in found and "integer" not in found
    verification = found["ptq"]["int8"].pop("verify")
    assert verification["differing"] == 0 and verification["images"] == 40
    assert found["fp32"] == whole["fp32"] and found["ptq"] == whole["ptq"]
    assert found["parameters"] == whole["parameters"]
    assert found["command"] == f"jaxqat quantize {float_run}"
    page = (float_run / "report.html").read_text()
    assert "PTQ W8A8 (int8), integer" in page and "QAT W8A8, integer" not in page
    assert (float_run / "figures/confusion_ptq_int8.png").is_file()
    assert files(float_run / "checkpoints") == checkpoints
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "write_report", lambda path: path)  # Saves seconds.
        quantize.quantize(float_run, batches=1, console=console)
    one_batch, network = results_of(float_run)["ptq"], files(float_run / "ptq")
    assert one_batch["int8"]["calibration_batches"] == 1
    results = to_json(train.train(tiny(), float_run, console=console))
    assert results["integer"] == whole["integer"] and results["ptq"] == one_batch
    assert files(float_run / "ptq") == network
    page = (float_run / "report.html").read_text()
    assert "PTQ W8A8 (int8), integer" in page and "QAT W8A8, integer" in page


def test_networks_by_several_recipes_stand_side_by_side(run, small_network, console, capsys):
    before, first = results_of(run), files(run / "ptq")
    command = ("quantize", run, "--method", "ptq", "--batches", 3, "--recipe", "int8_symmetric")
    assert run_command(*command) == 0
    assert "replaces" not in capsys.readouterr().out
    assert_ptq_is(run, *recomputed(run, 3, "int8_symmetric"), name="int8_symmetric")
    after = results_of(run)
    entry = after["ptq"].pop("int8_symmetric")
    assert entry["calibration_batches"] == 3 and entry["recipe"]["activations"] == "symmetric"
    assert after["speed"].pop("ptq_int8_symmetric")
    assert after == before and files(run / "ptq").items() > first.items()
    page = (run / "report.html").read_text()
    assert "48 training images (3 batches; recipe int8_symmetric)" in page
    for name in ("PTQ W8A8 (int8), integer", "PTQ W8A8 (int8_symmetric), integer"):
        assert f"Confusion matrix of {name}" in page
    # `verify` calibrates FP32 again with this recipe and not with that of the config.
    chosen: Any = {"stage": "ptq", "recipe": "int8_symmetric"}
    verification = verify.verify(run, **chosen, console=console)
    assert verification.differing == 0 and not verification.failures
    assert (run / "evaluations/verify_ptq_int8_symmetric_test.json").is_file()
    scores = evaluate.evaluate(run, **chosen, console=console)
    assert to_json(scores.metrics) == entry["test"] and scores.step == STEPS
    assert scores.recipe == "int8_symmetric"
    own = evaluate.evaluate(run, stage="ptq", console=console)  # That of the run.
    assert to_json(own.metrics) == before["ptq"]["int8"]["test"] and own.recipe == "int8"
    output = run / "ptq.stablehlo"
    export.export(run, output, format="stablehlo", **chosen, console=console)
    from jaxqat.export._stablehlo import load_stablehlo

    images = load_dataset(tiny().data).test.images
    _, logits = integer_graph.run(jaxqat.load(run / "ptq" / "int8_symmetric"), images)
    assert np.array_equal(load_stablehlo(output)(images), logits)
    assert run_command("evaluate", run, "--stage", "ptq", "--recipe", "w4a4") == 2
    assert f"`jaxqat quantize {run} --recipe w4a4` creates it; there are int8, int8_symmetric" in (
        capsys.readouterr().err
    )
    shutil.rmtree(run / "ptq" / "int8")
    assert load_network(RunFolder(run), "ptq").metadata["ptq"] == "int8_symmetric"
    shutil.copytree(run / "ptq" / "int8_symmetric", run / "ptq" / "w4a8")
    assert run_command("evaluate", run, "--stage", "ptq") == 2
    assert "several networks (int8_symmetric, w4a8): choose one by --recipe" in (
        capsys.readouterr().err
    )
    assert run_command("verify", run, "--recipe", "w4a8") == 2
    assert "--recipe chooses a network of --stage ptq" in capsys.readouterr().err


def test_the_same_command_gives_the_same_network_and_scores(
    run, small_network, monkeypatch, console
):
    monkeypatch.setattr(quantize, "write_report", lambda path: path)  # Saves seconds.
    before, network = results_of(run), files(run / "ptq")
    quantize.quantize(run, console=console)
    assert "this replaces the earlier network" in console.file.getvalue()
    assert files(run / "ptq") == network
    assert results_of(run)["ptq"]["int8"].items() > before["ptq"]["int8"].items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batches", "7"), "--batches must be in 1..6, the whole batches of 16"),
        (("--recipe", "int9"), "recipe must be one of int8,"),
        (("--recipe", "int8_dynamic"), "'int8_dynamic' takes activation ranges from each input"),
    ],
)
def test_invalid_options_are_named_and_change_nothing(
    run, small_network, capsys, arguments, message
):
    before = files(run)
    assert run_command("quantize", run, *arguments) == 2
    assert message in capsys.readouterr().err
    assert files(run) == before


def test_a_run_without_an_fp32_checkpoint_stays_unchanged(run, small_network, capsys):
    shutil.rmtree(run / "checkpoints/fp32")
    before = files(run)
    for _ in ("no folder", "an empty one"):
        assert run_command("quantize", run) == 2
        assert "there are no checkpoints of fp32" in capsys.readouterr().err
        assert files(run) == before
        (run / "checkpoints/fp32").mkdir(exist_ok=True)


def test_an_unfinished_fp32_stage_is_an_error(float_run, small_network, capsys):
    shutil.rmtree(float_run / f"checkpoints/fp32/{STEPS}")
    before = files(float_run)
    assert run_command("quantize", float_run) == 2
    assert f"its FP32 stage is at step {STEPS // 2} of {STEPS}" in capsys.readouterr().err
    assert files(float_run) == before


def test_an_interrupted_measurement_changes_nothing(run, small_network, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    before = files(run)
    monkeypatch.setattr("jaxqat.pipeline.integer_networks.verify_network", interrupted)
    assert run_command("quantize", run, "--batches", 1) == 130
    assert files(run) == before


def test_errors_of_a_missing_or_damaged_network_say_how_to_create_it(run, small_network, capsys):
    path = run / "ptq/int8/graph.json"
    path.write_text(path.read_text()[:-1])
    assert run_command("evaluate", run, "--stage", "ptq") == 1
    assert (
        f"delete {run / 'ptq' / 'int8'} and run `jaxqat quantize {run}` again"
        in capsys.readouterr().err
    )
    shutil.rmtree(run / "ptq")
    assert run_command("evaluate", run, "--stage", "ptq") == 2
    assert f"`jaxqat quantize {run}` creates it" in capsys.readouterr().err
