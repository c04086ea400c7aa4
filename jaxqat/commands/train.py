"""`jaxqat train`: the experiment from end to end.

Both stages are trained before the test split is read; until then only training and validation
images are used. The results keep the integer network of RUN/integer as 'integer', and that of
RUN/ptq, which was only calibrated, as 'ptq'.
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
    """Train FP32, then QAT; convert, evaluate and report. Run it again to resume.

    Resumes a stopped run, and leaves a finished one unchanged. If parts of the network have no
    integer form, the run ends without an integer network, and its results list the reasons.

    Args:
        experiment: YAML file with any of the options below.
        workdir: Run folder; created if it does not exist.
        from_run: Another run, whose finished FP32 stage is used instead of training one. A folder
            that has FP32 checkpoints already continues from its own.
        command: What was typed, recorded in the results.
        console: Where progress is printed; None for standard output.

    Returns:
        Content of RUN/results.json.

    Raises:
        RunFolderError: The folder belongs to another experiment or process, or is read-only; or the
            FP32 stage of the other run is not finished, or has other settings or data.
        DataError: The data cannot be used.
        RecipeError: The recipe does not fit the network.
        CheckpointError: No checkpoint is whole, or none can be written.
        ArtifactError: The integer network cannot be written.
        DivergedError: The loss or the weights became infinite or NaN.
        Stopped: A signal arrived; the state is saved.
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
    """Find the FP32 stage of the other run; None if this run trains its own."""
    if from_run is None:
        return None
    if folder.has_checkpoints("fp32"):
        console.print(f"fp32: {folder.path} continues from its own checkpoints.", highlight=False)
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
        **describe_network(networks, qat.params, qat.collections["quant"], graph),
    }
    write_test_samples(folder, networks.dataset)
    write_json(folder.results, results)
    write_report(folder.path)
    return results


def _deploy(
    networks: Networks, folder: RunFolder, qat: Model, stop: StopRequest, console: Console
) -> tuple[IntegerGraph | None, dict[str, Any]]:
    """Convert the trained network, test and verify it; return it with its part of the results."""
    try:
        graph = make_network(networks, folder, qat)
    except ConversionError as error:
        warn(f"this run has no integer network. {error}", console)
        return None, {"integer": {"error": str(error)}, "speed": {}}
    stop.raise_if_set()
    metrics, images_per_s = measure_network(networks, graph)
    stop.raise_if_set()
    verification = check_network(networks, qat, graph, console)
    return graph, {
        "integer": {"test": metrics, "requantization": graph.requantization, "step": qat.step},
        "verify": verification.to_dict(),
        "speed": {"integer": {"evaluate_images_per_s": images_per_s}},
    }


def _untrained(
    networks: Networks,
    folder: RunFolder,
    start: Callable[[], Model],
    stop: StopRequest,
    console: Console,
) -> dict[str, Any]:
    """Return the part of the results about post-training quantization.

    A network that `quantize` made before stays unchanged.
    """
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
