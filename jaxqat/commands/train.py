"""The experiment from end to end: train, evaluate, report.

The three functions are what the command line and the scripts call. `train` reads the test split
after both stages only; until then nothing but training and validation images is looked at. What is
called int8 is the integer network in RUN/int8; ptq, that of RUN/ptq, was never fine-tuned.
"""

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxqat.errors import ConversionError
from jaxqat.integer._store.folder import save
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.config import Experiment, to_yaml
from jaxqat.pipeline.data import DataError, Dataset, load_dataset
from jaxqat.pipeline.display import print_results, warn
from jaxqat.pipeline.evaluation import Evaluator, Logits, measure
from jaxqat.pipeline.integer_networks import (
    check_network,
    is_finished,
    make_network,
    measure_network,
)
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.post_training import calibrated, examine
from jaxqat.pipeline.report import write_report
from jaxqat.pipeline.run.folder import RunFolder, check_config, claim, write_atomically, write_json
from jaxqat.pipeline.run.results import (
    describe_network,
    describe_run,
    describe_tests,
    write_test_samples,
)
from jaxqat.pipeline.run.snapshots import Model
from jaxqat.pipeline.stages import STAGES, StageRun
from jaxqat.pipeline.takeover import FloatStage, find_float_stage
from jaxqat.pipeline.training import StopRequest, stop_on_signals


def train(
    experiment: Experiment,
    workdir: Path,
    *,
    from_run: Path | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train both stages in a run folder, convert, test, and write results and report.

    A folder where this experiment was stopped is gone on with; one where it is finished is left
    as it is. Where the recipe leaves the network with parts that have no integer form, the run ends
    without an integer network, and its results say why.

    Args:
        experiment: What to do.
        workdir: The run folder; made if need be.
        from_run: Another run, whose finished FP32 stage is taken over; a folder that has
            checkpoints of FP32 already goes on from its own.
        command: What was typed, for the record.
        console: Where progress is shown; None for standard output.

    Returns:
        The content of results.json.

    Raises:
        RunFolderError: The folder cannot be used: another experiment's, read-only, taken. Or the
            FP32 stage of the other run: not finished, of other settings or data.
        DataError: The data cannot be used.
        RecipeError: The recipe does not fit the network.
        CheckpointError: No checkpoint is whole, or none can be written.
        ArtifactError: The integer network cannot be written.
        DivergedError: Training ran into infinity or NaN.
        Stopped: A signal came; the state is saved.
    """
    console = console or Console()
    with claim(Path(workdir)) as folder, stop_on_signals() as stop:
        check_config(folder, experiment)
        if is_finished(folder):
            return _already_finished(folder, console)
        dataset = load_dataset(experiment.data)
        stop.raise_if_set()
        _check_sizes(experiment, dataset)
        with matmul_precision(experiment):
            networks = Networks.build(experiment, dataset)
            taken = _float_stage(networks, folder, from_run, console)
            write_atomically(folder.config, to_yaml(experiment))
            if taken is not None:
                taken.copy_to(folder)
            results = _run(networks, folder, stop, console, command)
    print_results(results, console)
    console.print(f"report: {folder.report}", highlight=False)
    return results


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


def _float_stage(
    networks: Networks, folder: RunFolder, from_run: Path | None, console: Console
) -> FloatStage | None:
    """What is taken over from another run; None if nothing is."""
    if from_run is None:
        return None
    if folder.has_checkpoints("fp32"):
        console.print(f"fp32: {folder.path} goes on from its own checkpoints.", highlight=False)
        return None
    taken = find_float_stage(networks, Path(from_run))
    console.print(f"fp32: taken over from {from_run}.", highlight=False)
    return taken


def _run(
    networks: Networks, folder: RunFolder, stop: StopRequest, console: Console, command: str | None
) -> dict[str, Any]:
    runs = {name: StageRun(name, networks, folder, Evaluator(networks, name)) for name in STAGES}
    fp32 = runs["fp32"].train(lambda: Model(*networks.init()), stop=stop, console=console)
    stop.raise_if_set()
    start = functools.cache(partial(calibrated, networks, fp32))
    qat = runs["qat"].train(start, stop=stop, console=console)
    stop.raise_if_set()
    tests = {"fp32": _logits(runs["fp32"], fp32), "qat": _logits(runs["qat"], qat)}
    test, names = networks.dataset.test, networks.dataset.class_names
    measured = {name: measure(logits, test, names) for name, logits in tests.items()}
    stop.raise_if_set()
    graph, deployed = _deploy(networks, folder, qat, stop, console)
    stop.raise_if_set()
    untrained = (
        {"speed": {}} if graph is None else _untrained(networks, folder, start, stop, console)
    )
    tested = describe_tests(measured, folder)
    results = {
        **describe_run(networks.experiment, networks.dataset, command),
        **tested,
        **untrained,
        **deployed,
        "speed": {**tested["speed"], **untrained["speed"], **deployed["speed"]},
        **describe_network(networks, qat.params, qat.collections, graph),
    }
    write_test_samples(folder, networks.dataset)
    write_json(folder.results, results)
    write_report(folder.path)
    return results


def _deploy(
    networks: Networks, folder: RunFolder, qat: Model, stop: StopRequest, console: Console
) -> tuple[IntegerGraph | None, dict[str, Any]]:
    """Convert the trained network, test and verify what came of it; and what results say of it."""
    try:
        graph = make_network(networks, folder, qat)
    except ConversionError as error:
        warn(f"this run has no integer network. {error}", console)
        return None, {"int8": {"error": str(error)}, "speed": {}}
    stop.raise_if_set()
    metrics, images_per_s = measure_network(networks, graph)
    stop.raise_if_set()
    verification = check_network(networks, qat, graph, console)
    return graph, {
        "int8": {"test": metrics, "requantization": graph.requantization, "step": qat.step},
        "verify": verification.to_dict(),
        "speed": {"int8": {"evaluate_images_per_s": images_per_s}},
    }


def _untrained(
    networks: Networks,
    folder: RunFolder,
    start: Callable[[], Model],
    stop: StopRequest,
    console: Console,
) -> dict[str, Any]:
    """What results say of post-training quantization; a network of `quantize` stays as it is."""
    before = folder.read_results() if folder.results.exists() else {}
    if "ptq" in before and folder.ptq.is_dir():
        return {"ptq": before["ptq"], "speed": {"ptq": before["speed"]["ptq"]}}
    if not networks.experiment.qat.test_calibrated:
        return {"speed": {}}
    try:
        graph, tested = examine(networks, start(), stop)
    except ConversionError as error:
        warn(f"this run has no integer network without training. {error}", console)
        return {"speed": {}}
    save(graph, folder.ptq, overwrite=True)
    return tested


def _logits(run: StageRun, model: Model) -> Logits:
    return partial(run.evaluator.logits, model.params, model.collections)
