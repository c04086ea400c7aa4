"""Train, evaluate and report from end to end, on a network that compiles in a second."""

import dataclasses
import html
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_run import STEPS, STEPS_PER_EPOCH, files, signal_at, tiny

from jaxqat import load, make_executor
from jaxqat.commands import evaluate, report, train
from jaxqat.errors import RecipeError
from jaxqat.pipeline import compilation_choice, stages
from jaxqat.pipeline.checkpoint import CheckpointError
from jaxqat.pipeline.config import config_hash, to_yaml
from jaxqat.pipeline.data import DataError, load_dataset
from jaxqat.pipeline.evaluation import Predictor
from jaxqat.pipeline.measurements import Evaluation
from jaxqat.pipeline.report.samples import read_samples
from jaxqat.pipeline.results import read, to_json
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.run.snapshots import check_same_data
from jaxqat.pipeline.scores import REESTIMATED
from jaxqat.pipeline.training import DivergedError, Stopped

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console, finished, no_report = tiny_run.console, tiny_run.finished, tiny_run.no_report


def arrays(run: Path) -> dict[str, dict]:
    """SHA-256 of every array of the last checkpoint of both stages."""
    found = {}
    for stage in ("fp32", "qat"):
        info = run / "checkpoints" / stage / str(STEPS) / "info" / "metadata"
        found[stage] = json.loads(info.read_text())["arrays"]
    return found


def network(run: Path) -> dict[str, bytes]:
    """Bytes of the files of the integer network."""
    return {path.name: path.read_bytes() for path in (run / "integer").iterdir()}


def losses(run: Path) -> list[tuple]:
    return [(r["stage"], r["epoch"], r["loss"]) for r in RunFolder(run).read_metrics()]


def test_a_run_says_first_what_it_will_do(finished):
    lines = finished.with_suffix(".log").read_text().splitlines()
    parameters = json.loads((finished / "results.json").read_text())["parameters"]
    images = load_dataset(tiny().data).train.images / 255
    mean, std = images.mean(), images.std()
    assert lines[:8] == [
        "data: loading digits",
        "network: tracing it",
        f"network: ResNet-18, width 64, {parameters:,} parameters",
        "data: digits, 100 training and 40 test images of 8x8x1, 10 classes",
        f"normalization: mean {mean:.3f}, standard deviation {std:.3f}, of pixels in 0..1",
        "augmentation: random crop after padding by 1",
        "fp32: 2 epochs of 6 steps of 16 images, 12 steps in all",
        "qat: 2 epochs of 6 steps of 16 images, 12 steps in all",
    ]


def test_no_part_of_a_run_is_silent(finished):
    lines = finished.with_suffix(".log").read_text().splitlines()
    shown = [line for line in lines[8:] if re.match("(fp32|qat|cal|integer|ver|PTQ|writ)", line)]
    shown = [
        line for line in shown if not re.search(r"remaining|left$", line)
    ]  # On a slow machine.
    expected = (
        *("fp32: making", "fp32: the last, partial", "fp32: compiling the training step"),
        *("fp32 epoch 1/2", "fp32 epoch 2/2"),
        *("calibration: checking batch norm's statistics on 32", "calibration: observing ranges"),
        *("qat: the last, partial", "qat: compiling the training step", "qat epoch 1/2"),
        *("qat: compiling the training step with frozen ranges", "qat epoch 2/2"),
        *("fp32: compiling for evaluation", "fp32: evaluating 40 images"),
        *("qat: compiling for evaluation", "qat: evaluating 40 images"),
        *("integer: converting", "integer: compiling for", "integer: evaluating 40 images"),
        *("verifying every code on 40 images", "PTQ (int8): converting to integers"),
        *("PTQ (int8): compiling for", "PTQ (int8): evaluating 40", "writing the results and"),
    )
    assert len(shown) == len(expected)
    assert all(line.startswith(start) for line, start in zip(shown, expected, strict=True))


def test_the_images_of_the_report_have_the_predictions_of_both_networks(finished):
    samples, results = read_samples(finished), RunFolder(finished).read_results()
    assert samples is not None
    assert samples.networks == ("FP32", "QAT W8A8, integer")
    logits = np.asarray(make_executor(load(finished / "integer"))(samples.images), np.float64)
    np.testing.assert_array_equal(samples.predicted[1], logits.argmax(-1))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(samples.probabilities[1], shares.max(-1), rtol=1e-6)
    assert results.integer is not None
    right, real = (
        np.trace(test.confusion_matrix) for test in (results.integer.test, results.fp32.test)
    )
    images, changed, errors = samples.totals
    assert (images, errors) == (40, 40 - right)
    assert changed >= abs(right - real)
    assert (samples.predicted[0] != samples.predicted[1])[samples.changed].all()
    assert (samples.predicted[1] != samples.labels)[samples.errors].all()


@pytest.mark.parametrize("stage", ["integer", "ptq"])
def test_the_images_of_a_report_are_classified_again_on_request(
    finished, tmp_path, small_network, console, monkeypatch, stage
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    monkeypatch.setattr(report, "write_report", lambda path: path)  # Saves seconds.
    before = (run / "report_data.npz").read_bytes()
    (run / "report_data.npz").unlink()
    if stage == "ptq":
        results = RunFolder(run).read_results()
        bare = dataclasses.replace(results, qat=None, integer=None, verify=None)
        RunFolder(run).write_results(bare)
    report.report(run, console=console)
    assert not (run / "report_data.npz").exists()
    report.report(run, predict=True, console=console)
    samples = read_samples(run)
    assert samples is not None
    if stage == "integer":
        assert (run / "report_data.npz").read_bytes() == before
    else:
        assert samples.networks == ("FP32", "PTQ W8A8 (int8), integer")
        logits = make_executor(load(run / "ptq" / "int8"))(samples.images)
        np.testing.assert_array_equal(samples.predicted[1], np.argmax(logits, -1))


def test_a_finished_run_has_its_files_and_results(finished):
    assert {p.name for p in finished.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "figures",
        "integer",
        "metrics.csv",
        "metrics.jsonl",
        "ptq",
        "ranges.csv",
        "report.html",
        "report_data.npz",
        "results.json",
        *(["tensorboard"] if importlib.util.find_spec("tensorboardX") else []),
    }
    assert RunFolder(finished).load_config() == tiny()
    lines = RunFolder(finished).read_metrics()
    assert [(r["stage"], r["epoch"], r["step"], r["frozen"]) for r in lines] == [
        ("fp32", 1, 6, False),
        ("fp32", 2, 12, False),
        ("qat", 1, 6, False),
        ("qat", 2, 12, True),
    ]
    results = json.loads((finished / "results.json").read_text())
    assert results["name"] == "tiny"
    assert results["command"] == "jaxqat train"
    assert results["config_hash"] == config_hash(tiny())
    assert results["data"] == load_dataset(tiny().data).fingerprint
    assert results["precision"] == "float32"
    assert {"python", "jax", "jaxlib", "flax", "aqtp", "orbax"} <= results["environment"].keys()
    assert results["environment"]["platform"] == "cpu"
    for metrics in (
        results["fp32"]["test"],
        results["qat"]["test"],
        results["ptq"]["int8"]["test"],
        results["integer"]["test"],
    ):
        assert metrics["n"] == 40
        assert np.sum(metrics["confusion_matrix"]) == 40
    # Two 3x3 convolutions of 1 and 4 channels to 4, their batch norms, and 4 to 10 with bias.
    kernels = 3 * 3 * 1 * 4 + 3 * 3 * 4 * 4 + 4 * 10
    parameters = kernels + 2 * 2 * 4 + 10
    assert results["parameters"] == parameters
    assert results["size_bytes"]["fp32"] == 4 * parameters
    # One byte per weight; an int32 bias and a float32 multiplier per output channel (4, 4, 10).
    assert results["size_bytes"]["integer"] == kernels + (4 + 4) * (4 + 4 + 10)
    assert results["integer"]["requantization"] == "float"
    assert results["integer"]["step"] == STEPS
    assert set(results["speed"]["integer"]) == {"evaluate_images_per_s"}
    # 8x8 images at stride 2 make 4x4 outputs.
    assert results["macs"] == 16 * (3 * 3 * 1 * 4) + 16 * (3 * 3 * 4 * 4) + 4 * 10
    layers = {layer["path"]: layer for layer in results["layers"]}
    assert list(layers) == ["stem_conv", "block_conv", "head"]
    assert layers["block_conv"]["act_min"] == 0  # Behind a ReLU.
    assert layers["block_conv"]["act_max"] > 0
    assert layers["head"]["weight_min"] < 0 < layers["head"]["weight_max"]


def test_every_epoch_has_its_gradient_norm_and_the_ranges_of_every_layer(finished):
    records, results = RunFolder(finished).read_metrics(), RunFolder(finished).read_results()
    assert all(record["gradient_norm"] > 0 for record in records)
    assert [list(record["ranges"]) for record in records[:2]] == [[], []]
    expected = {layer.path: [layer.act_min, layer.act_max] for layer in results.layers}
    assert records[-1]["ranges"] == expected and len(expected) == 3
    table = (finished / "metrics.csv").read_text().splitlines()
    assert len(table) == 5 and table[4].startswith("qat,2,12,")


def test_statistics_that_were_estimated_again_are_told_beside_the_scores(
    finished, tmp_path, small_network, console
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "report.html").unlink()
    experiment = tiny(qat__reestimate_batch_norm=True)
    (run / "config.yaml").write_text(to_yaml(experiment))
    train.train(experiment, run, console=console)
    printed, page = " ".join(console.file.getvalue().split()), (run / "report.html").read_text()
    assert f"note: {REESTIMATED}" in printed
    assert REESTIMATED in html.unescape(page)
    assert "they were estimated again" not in (finished / "report.html").read_text()


def test_the_dropped_batch_is_printed(finished):
    log = finished.with_suffix(".log").read_text()
    assert log.count("the last, partial batch of each epoch is dropped: 4 of 100 images") == 2


def test_a_finished_run_stays_unchanged(finished, console):
    before = files(finished)
    results = train.train(tiny(), finished, console=console)
    assert "this run is finished" in console.file.getvalue()
    assert to_json(results) == json.loads((finished / "results.json").read_text())
    assert files(finished) == before


@pytest.mark.parametrize(
    ("steps", "stage"),
    [(3, "fp32"), (STEPS + 2, "qat"), (STEPS + STEPS_PER_EPOCH + 2, "qat")],
    ids=["fp32", "qat", "qat_frozen"],
)
def test_a_run_stopped_within_an_epoch_and_resumed_ends_with_the_same_bits(
    finished, tmp_path, monkeypatch, no_report, small_network, console, steps, stage
):
    run = tmp_path / "run"
    signal_at(monkeypatch, steps)
    with pytest.raises(Stopped):
        train.train(tiny(), run, console=console)
    newest = max(map(int, os.listdir(run / "checkpoints" / stage)))
    assert newest % STEPS_PER_EPOCH != 0
    assert not (run / "results.json").exists()
    train.train(tiny(), run, console=console)
    assert f"{stage}: resumed at step {newest} of {STEPS}" in console.file.getvalue()
    assert arrays(run) == arrays(finished)
    assert losses(run) == losses(finished)
    ours, theirs = (json.loads((r / "results.json").read_text()) for r in (run, finished))
    assert ours["qat"]["test"] == theirs["qat"]["test"]
    assert ours["integer"] == theirs["integer"]
    assert network(run) == network(finished)
    assert ours["layers"] == theirs["layers"]


def test_a_resumed_epoch_knows_how_many_of_its_steps_were_skipped(
    tmp_path, monkeypatch, no_report, small_network, console
):
    run, save = tmp_path / "run", stages.FolderReporter.save
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(
            stages.FolderReporter,
            "save",
            lambda self, *state, **facts: save(self, *state, **{**facts, "epoch_skipped": 1}),
        )
        signal_at(patch, 3)
        train.train(tiny(), run, console=console)
    given = []

    def resumed(*arguments, **options):
        given.append(options["epoch_skipped"])
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run_stage", resumed)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny(), run, console=console)
    assert given == [1]


def test_a_resumed_run_has_the_same_bits_in_the_fast_form(
    tmp_path, monkeypatch, no_report, small_network, console
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    expected = train.train(tiny(compilation="fast"), whole, console=console)
    signal_at(monkeypatch, STEPS + 2)
    with pytest.raises(Stopped):
        train.train(tiny(compilation="fast"), run, console=console)
    found = train.train(tiny(compilation="fast"), run, console=console)
    assert arrays(run) == arrays(whole)
    assert network(run) == network(whole)
    # What is trained is what is deployed, too.
    assert found.verify is not None and found.verify == expected.verify
    assert (found.verify.differing, found.verify.logits_only) == (0, False)


def test_a_run_keeps_how_it_was_compiled(tmp_path, monkeypatch, no_report, small_network, console):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seconds = {"default": 2.0, "fast": 1.0}
    monkeypatch.setattr(compilation_choice, "measure", lambda networks: seconds)
    monkeypatch.setattr(compilation_choice, "LEAST_VALUES", 0)
    run, named = tmp_path / "run", tmp_path / "named"
    signal_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        train.train(tiny(compilation="auto"), run, console=console)
    seconds["default"] = 0.1  # As on another machine.
    train.train(tiny(compilation="auto"), run, console=console)
    train.train(tiny(compilation="fast"), named, console=console)
    assert arrays(run) == arrays(named)


def test_a_damaged_checkpoint_is_named_and_trained_again_with_the_same_bits(
    finished, tmp_path, no_report, small_network, console, caplog
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("results.json", "report.html"):
        (run / name).unlink()
    for path in (run / "checkpoints" / "qat" / str(STEPS)).rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=rf"(?s)qat/{STEPS} is damaged.*train --repair"):
        evaluate.evaluate(run, stage="qat", console=console)
    train.train(tiny(), run, console=console)
    assert f"{STEPS} is damaged" in caplog.text
    assert f"qat: resumed at step {STEPS_PER_EPOCH} of {STEPS}" in console.file.getvalue()
    assert arrays(run) == arrays(finished)
    assert losses(run) == losses(finished)


@pytest.mark.parametrize(
    ("stage", "split"),
    [("qat", "test"), ("fp32", "train"), ("integer", "test"), ("integer", "train")],
)
def test_evaluate_needs_only_the_folder_and_writes_only_evaluations(
    finished, tmp_path, small_network, console, stage, split
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = files(run)
    result = evaluate.evaluate(run, stage=stage, split=split, console=console)
    added = f"evaluations/{stage}_{split}.json"
    after = files(run)
    assert after.pop(added)
    assert after == before
    assert read(run / added, Evaluation, error=RunFolderError) == result
    assert (result.stage, result.split, result.step) == (stage, split, STEPS)
    if split == "test":
        expected = {t.key: t.test for t in RunFolder(run).read_results().tested()}
        assert result.metrics == expected[stage]
    else:
        assert result.metrics.n == 100
    assert f"{stage} at step {STEPS}" in console.file.getvalue()


def test_report_is_written_again_from_the_folder(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("report.html", "checkpoints"))
    assert report.report(run) == run / "report.html"
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("stage", "split", "error", "message"),
    [
        ("fp32", "validation", DataError, "no validation split"),
        ("qat", "test", RunFolderError, "no checkpoints of qat"),
    ],
)
def test_a_missing_split_or_checkpoint_is_an_error_of_evaluate(
    finished, tmp_path, small_network, console, stage, split, error, message
):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("qat"))
    with pytest.raises(error, match=message):
        evaluate.evaluate(run, stage=stage, split=split, console=console)


def test_the_test_split_is_read_only_after_training(
    tmp_path, monkeypatch, no_report, small_network, console
):
    read = []
    logits = Predictor.logits

    def watch(self, split, *variables, **more):
        read.append((len(RunFolder(tmp_path).read_metrics()), len(split)))
        return logits(self, split, *variables, **more)

    monkeypatch.setattr(Predictor, "logits", watch)
    changes = {"data__validation_size": 30, "data__test_limit": 41}
    train.train(tiny(**changes), tmp_path, console=console)
    # Validation after each of the four epochs, before its line is written; then the test images,
    # with a warm-up for each of four networks: FP32, QAT, integer, PTQ.
    assert read[:4] == [(0, 30), (1, 30), (2, 30), (3, 30)]
    assert read[4:] == [(4, 1), (4, 41)] * 4
    lines = RunFolder(tmp_path).read_metrics()
    assert all(0 <= r["validation_accuracy"] <= 1 for r in lines)


def test_select_best_continues_from_the_best_checkpoint_and_tests_it(
    tmp_path, monkeypatch, no_report, small_network, console
):
    # The first epoch of each stage has the best validation accuracy.
    scores = iter([0.9, 0.1, 0.8, 0.2])

    def validate(self, state):
        return {"validation_loss": 1.0, "validation_accuracy": next(scores)}

    monkeypatch.setattr("jaxqat.pipeline.stages.StageRun._validate", validate)
    changes = {"data__validation_size": 30, "select": "best", "qat__optimizer__learning_rate": 1e-9}
    train.train(tiny(**changes), tmp_path, console=console)
    for stage in ("fp32", "qat", "integer"):
        result = evaluate.evaluate(tmp_path, stage=stage, console=console)
        assert result.step == STEPS_PER_EPOCH
    kernels = {}
    for stage, step in (("fp32", 6), ("fp32", 12), ("qat", 6)):
        info = tmp_path / "checkpoints" / stage / str(step) / "info" / "metadata"
        kernels[stage, step] = json.loads(info.read_text())["arrays"]
    # At this learning rate QAT does not change the weights: they are those of the best epoch.
    path = "params/head/kernel"
    assert kernels["qat", 6]["model"][path] == kernels["fp32", 6]["model"][path]
    assert kernels["qat", 6]["model"][path] != kernels["fp32", 12]["model"][path]


def test_frozen_epochs_do_not_change_ranges_and_statistics(finished):
    (before, after) = (
        json.loads((finished / "checkpoints" / "qat" / str(s) / "info" / "metadata").read_text())
        for s in (STEPS_PER_EPOCH, STEPS)
    )
    model, frozen = before["arrays"]["model"], after["arrays"]["model"]
    for path, array in model.items():
        changed = frozen[path] != array
        assert changed == path.startswith("params/"), path


def test_several_steps_per_dispatch_give_the_same_run(
    finished, tmp_path, no_report, small_network, console
):
    changes = {"fp32__steps_per_dispatch": 4, "qat__steps_per_dispatch": 4}
    train.train(tiny(**changes), tmp_path, console=console)
    # Compiled differently, so equal up to rounding: a difference of 2**-24 in a weight grows over
    # 24 steps. A step omitted or done twice changes the loss by a hundredth.
    for ours, theirs in zip(losses(tmp_path), losses(finished), strict=True):
        assert ours[:2] == theirs[:2]
        assert abs(ours[2] - theirs[2]) < 1e-3


def test_infinite_loss_stops_the_run_and_keeps_earlier_checkpoints(
    tmp_path, small_network, console
):
    settings = tiny(qat__optimizer__learning_rate=3e38)
    with pytest.raises(DivergedError, match=r"qat: .*epoch 1"):
        train.train(settings, tmp_path, console=console)
    assert os.listdir(tmp_path / "checkpoints" / "qat") == []
    assert (tmp_path / "checkpoints" / "fp32" / str(STEPS)).is_dir()
    assert {r["stage"] for r in RunFolder(tmp_path).read_metrics()} == {"fp32"}
    assert not (tmp_path / "results.json").exists()
    assert evaluate.evaluate(tmp_path, stage="fp32", console=console).metrics.n == 40


def test_another_config_is_an_error_and_changes_nothing(finished, console):
    before = files(finished)
    with pytest.raises(RunFolderError, match=r"seed: 0 -> 1"):
        train.train(tiny(seed=1), finished, console=console)
    assert files(finished) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data__name": "no_such_set"}, DataError, "no_such_set"),
        ({"fp32__batch_size": 101}, DataError, "fp32.batch_size must be at most the 100 training"),
        ({"quant": {"rules": [{"path": "haed"}]}}, RecipeError, "matches none of"),
    ],
    ids=["data", "batch_size", "rule"],
)
def test_invalid_input_leaves_no_folder(
    tmp_path, monkeypatch, small_network, console, changes, error, message
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("JAXQAT_CACHE_DIR", str(tmp_path / "nothing"))
    with pytest.raises(error, match=message):
        train.train(tiny(**changes), tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()


def test_data_other_than_that_of_the_checkpoints_is_an_error(
    finished, tmp_path, monkeypatch, small_network, console
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "results.json").unlink()
    dataset = load_dataset(tiny().data)
    other = dataclasses.replace(dataset, fingerprint={**dataset.fingerprint, "version": "other"})
    for command in (train, evaluate):
        monkeypatch.setattr(command, "load_dataset", lambda config: other)
    for call in (
        lambda: train.train(tiny(), run, console=console),
        lambda: evaluate.evaluate(run, stage="qat", console=console),
        lambda: evaluate.evaluate(run, stage="integer", console=console),
    ):
        with pytest.raises(RunFolderError, match=r"was trained on other data.* version: .*'other'"):
            call()


def test_other_data_is_told_by_the_facts_that_differ():
    there = {"version": "1", "sha256": {"train": 64 * "a", "test": 64 * "b"}, "counts": {"test": 9}}
    here = {**there, "sha256": {"train": 64 * "a", "test": 64 * "c"}, "counts": {"test": 8}}
    with pytest.raises(RunFolderError) as caught:
        check_same_data("the network", there, here)
    assert str(caught.value) == (
        "the network was trained on other data. There -> here: counts.test: 9 -> 8; "
        "sha256.test: 'bbbbbbbbbbb...' -> 'ccccccccccc...'"
    )


def test_checkpoints_are_saved_every_n_epochs_and_at_the_end(
    tmp_path, no_report, small_network, console
):
    settings = tiny(
        fp32__epochs=3,
        qat__epochs=1,
        checkpoint={"every_epochs": 2, "keep_last": 5},
        qat__test_calibrated=False,
    )
    results = train.train(settings, tmp_path, console=console)
    steps = sorted(map(int, os.listdir(tmp_path / "checkpoints" / "fp32")))
    assert steps == [2 * STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH]
    assert results.ptq == {}
    assert not (tmp_path / "ptq").exists()


def test_a_stop_is_saved_even_if_no_checkpoint_is_due(
    tmp_path, monkeypatch, small_network, console
):
    signal_at(monkeypatch, STEPS_PER_EPOCH)
    with pytest.raises(Stopped):
        train.train(tiny(checkpoint={"every_epochs": 9}), tmp_path, console=console)
    assert os.listdir(tmp_path / "checkpoints" / "fp32") == [str(STEPS_PER_EPOCH)]
    assert [r["epoch"] for r in RunFolder(tmp_path).read_metrics()] == [1]
