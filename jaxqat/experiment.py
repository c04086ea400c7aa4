"""The experiment from end to end: train, evaluate, report.

The three functions are what the command line and the scripts call. The test split is read once by
`train`, after both stages; until then nothing but training and validation images is looked at.
"""

import functools
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxqat.config import Experiment, to_yaml
from jaxqat.data import DataError, Dataset, Split, load_dataset
from jaxqat.display import print_evaluation, print_results
from jaxqat.metrics import classification_metrics
from jaxqat.networks import Evaluator, Networks, matmul_precision
from jaxqat.report import write_report, write_samples
from jaxqat.results import describe_network, describe_run, stage_seconds
from jaxqat.runfolder import (
    RunFolder,
    RunFolderError,
    check_config,
    claim,
    write_atomically,
    write_json,
)
from jaxqat.snapshots import Model, open_store, restore_selected
from jaxqat.stages import STAGES, StageRun
from jaxqat.training import StopRequest, stop_on_signals

SPLITS = ("test", "train", "validation")
SAMPLE_COUNT = 32


def train(
    experiment: Experiment,
    workdir: Path,
    *,
    command: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train both stages in a run folder, test them, and write results and report.

    A folder where this experiment was stopped is gone on with; one where it is finished is left
    as it is.

    Args:
        experiment: What to do.
        workdir: The run folder; made if need be.
        command: What was typed, for the record.
        console: Where progress is shown; None for standard output.

    Returns:
        The content of results.json.

    Raises:
        RunFolderError: The folder cannot be used: another experiment's, read-only, taken.
        DataError: The data cannot be used.
        RecipeError: The recipe does not fit the network.
        CheckpointError: No checkpoint is whole, or none can be written.
        DivergedError: Training ran into infinity or NaN.
        Stopped: A signal came; the state is saved.
    """
    console = console or Console()
    with claim(Path(workdir)) as folder, stop_on_signals() as stop:
        check_config(folder, experiment)
        if folder.results.exists():
            return _already_finished(folder, console)
        dataset = load_dataset(experiment.data)
        stop.raise_if_set()
        _check_sizes(experiment, dataset)
        with matmul_precision(experiment):
            networks = Networks.build(experiment, dataset)
            write_atomically(folder.config, to_yaml(experiment))
            results = _run(networks, folder, stop, console, command)
    print_results(results, console)
    console.print(f"report: {folder.report}", highlight=False)
    return results


def evaluate(
    workdir: Path, *, stage: str = "qat", split: str = "test", console: Console | None = None
) -> dict[str, Any]:
    """Test the network of a stage on a split, from the run folder alone.

    Writes RUN/evaluations/STAGE_SPLIT.json and nothing else.

    Returns:
        The metrics, and which checkpoint they are of.

    Raises:
        RunFolderError: It is no run folder, or cannot be written.
        DataError: The data is missing, damaged or another than the run's.
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    console = console or Console()
    folder = RunFolder(Path(workdir))
    experiment = folder.load_config()
    if not folder.checkpoints(stage).is_dir():
        raise RunFolderError(f"{folder.checkpoints(stage)}: there are no checkpoints of {stage}.")
    dataset = load_dataset(experiment.data)
    images = _split(dataset, split)
    with matmul_precision(experiment):
        networks = Networks.build(experiment, dataset)
        with open_store(experiment, folder, stage, read_only=True) as store:
            restored = restore_selected(store, networks, stage)
        metrics, speed = _measure(
            Evaluator(networks, stage), Model.of(restored), images, dataset.class_names
        )
    result = {
        **describe_run(networks, None),
        "stage": stage,
        "split": split,
        "step": restored.step,
        "evaluate_images_per_s": speed,
        "metrics": metrics,
    }
    path = folder.evaluation(stage, split)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path.parent}: cannot be made: {error.strerror}.") from error
    write_json(path, result)
    print_evaluation(result, console)
    return result


def report(workdir: Path) -> Path:
    """Draw the report of a finished run again, from its folder alone.

    Raises:
        RunFolderError: It is no run folder.
        ReportError: A file that the report needs is missing or broken.
    """
    folder = RunFolder(Path(workdir))
    folder.load_config()
    return write_report(folder.path)


def _already_finished(folder: RunFolder, console: Console) -> dict[str, Any]:
    results = folder.read_results()
    console.print(f"{folder.path}: this run is finished; nothing is left to do.", highlight=False)
    if not folder.report.exists():
        write_report(folder.path)
    print_results(results, console)
    return results


def _check_sizes(experiment: Experiment, dataset: Dataset) -> None:
    for name in STAGES:
        batch_size = getattr(experiment, name).batch_size
        if batch_size > len(dataset.train):
            raise DataError(
                f"{name}.batch_size must be at most the {len(dataset.train)} training images, "
                f"got {batch_size}."
            )


def _run(
    networks: Networks, folder: RunFolder, stop: StopRequest, console: Console, command: str | None
) -> dict[str, Any]:
    runs = {name: StageRun(name, networks, folder, Evaluator(networks, name)) for name in STAGES}
    fp32 = runs["fp32"].train(lambda: Model(*networks.init()), stop=stop, console=console)
    stop.raise_if_set()
    calibrated = functools.cache(partial(_calibrated, networks, fp32))
    qat = runs["qat"].train(calibrated, stop=stop, console=console)
    stop.raise_if_set()
    models = {"fp32": fp32, "qat": qat}
    if networks.experiment.qat.test_calibrated:
        models["calibrated"] = calibrated()
    results = _test(networks, folder, runs, models, command)
    stop.raise_if_set()
    sample = networks.dataset.test
    write_samples(
        folder.path,
        sample.images[:SAMPLE_COUNT],
        sample.labels[:SAMPLE_COUNT],
        networks.dataset.class_names,
    )
    write_json(folder.results, results)
    write_report(folder.path)
    return results


def _calibrated(networks: Networks, fp32: Model) -> Model:
    """The trained float network with activation ranges: where QAT starts."""
    ranges = networks.calibrate(fp32.params, fp32.collections)
    return Model(fp32.params, {**fp32.collections, "quant": ranges})


def _test(
    networks: Networks,
    folder: RunFolder,
    runs: dict[str, StageRun],
    models: dict[str, Model],
    command: str | None,
) -> dict[str, Any]:
    """Read the test split, once for each network, and put the results together."""
    test, names = networks.dataset.test, networks.dataset.class_names
    records = folder.read_metrics()
    results, speed = describe_run(networks, command), {}
    for name in STAGES:
        metrics, images_per_s = _measure(runs[name].evaluator, models[name], test, names)
        timing = stage_seconds(records, name)
        speed[name] = {
            "train_images_per_s": timing.pop("train_images_per_s"),
            "evaluate_images_per_s": images_per_s,
        }
        results[name] = {"test": metrics, **timing}
    if "calibrated" in models:
        metrics, _ = _measure(runs["qat"].evaluator, models["calibrated"], test, names)
        results["qat"]["calibrated"] = {"test": metrics}
    qat = models["qat"]
    network = describe_network(networks, qat.params, qat.collections["quant"])
    return {**results, "speed": speed, **network}


def _measure(
    evaluator: Evaluator, model: Model, split: Split, class_names: tuple[str, ...]
) -> tuple[dict[str, Any], float]:
    """Metrics over a split and images/s, the compilation not counted."""
    evaluator.logits(model.params, model.collections, split.take(np.arange(1)))
    start = time.perf_counter()
    logits = evaluator.logits(model.params, model.collections, split)
    seconds = time.perf_counter() - start
    return classification_metrics(split.labels, logits, class_names), len(split) / seconds


def _split(dataset: Dataset, name: str) -> Split:
    split = getattr(dataset, name)
    if split is None:
        raise RunFolderError("this run has no validation split (data.validation_size is 0).")
    return split
