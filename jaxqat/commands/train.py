"""`jaxqat train`: the experiment from end to end.

Both stages are trained before the test split is used. In the results, 'integer' is the integer
network of QAT in RUN/integer, and 'ptq' holds the calibrated ones in RUN/ptq, by recipe.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from rich.console import Console

from jaxqat.analysis import Analysis
from jaxqat.analysis._text import counted
from jaxqat.errors import ConversionError
from jaxqat.integer._store.files import write_atomically
from jaxqat.pipeline.advice import analyze_for_advice, is_worse, print_advice
from jaxqat.pipeline.compilation_choice import find_compilation
from jaxqat.pipeline.config import Experiment, to_yaml
from jaxqat.pipeline.damage import check_undamaged
from jaxqat.pipeline.damage import repair as move_damaged_aside
from jaxqat.pipeline.data import DataError, Dataset, load_dataset
from jaxqat.pipeline.display import note_islands, print_results, warn
from jaxqat.pipeline.evaluation import Measured, measure
from jaxqat.pipeline.integer_networks import (
    check_network,
    is_finished,
    make_network,
    measure_network,
    save_ptq,
)
from jaxqat.pipeline.models import network_name
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.post_training import calibrated, convert_and_test, warn_unconverged
from jaxqat.pipeline.recipes import recipe_name, with_recipe
from jaxqat.pipeline.report import write_report
from jaxqat.pipeline.results import TRAINED_STAGES, IntegerResult, Results, Speed
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError, check_config, claim
from jaxqat.pipeline.run.results import (
    bits_name,
    count_parameters,
    float_results,
    stage_result,
    verification_result,
    write_test_samples,
)
from jaxqat.pipeline.run.snapshots import Model, restore_model
from jaxqat.pipeline.stages import StageRun
from jaxqat.pipeline.takeover import FloatStage, find_float_stage
from jaxqat.pipeline.terminal import say, tell


def train(
    experiment: Experiment,
    workdir: Path,
    *,
    recipe: str | None = None,
    from_run: Path | None = None,
    repair: bool = False,
    command: str | None = None,
    console: Console | None = None,
) -> Results:
    """Train FP32, then QAT; convert, evaluate and report. Run it again to resume.

    Resumes a stopped run, and leaves a finished one unchanged. If parts of the network have no
    integer form, the run ends without an integer network, and its results list the reasons.

    Args:
        experiment: YAML file with any of the options below, or the name of a preset, such as
            quickstart; required.
        workdir: Run folder; created if it does not exist.
        recipe: Preset, such as int8_symmetric or w4a8, or a YAML file with the settings of `quant`,
            in place of the experiment's own.
        from_run: Another run; start from its finished FP32 stage. A run with FP32 checkpoints
            continues from its own.
        repair: Move damaged checkpoints of the run aside, and train again from the last good ones.
        command: The command line, recorded in the results.
        console: Where progress is printed; None for standard output.

    Returns:
        Content of RUN/results.json.

    Raises:
        RunFolderError: If the folder belongs to another experiment or process, or is read-only; or
            if the FP32 stage of the other run is not finished, or has other settings or data.
        DataError: If the data is missing, damaged or unusable.
        RecipeError: If the recipe does not exist or does not fit the network.
        TargetError: If the network of `model.target` cannot be used.
        CheckpointError: If a finished run has a damaged checkpoint, if all are damaged, or if none
            can be written.
        ArtifactError: If the integer network cannot be written.
        DivergedError: If the loss, a gradient or the weights became infinite or NaN.
        Stopped: If a signal came during training; the state was saved.
    """
    console = console or Console()
    experiment = with_recipe(experiment, recipe)
    with claim(Path(workdir)) as folder:
        check_config(folder, experiment)
        if repair:
            _repair(folder, experiment, console)
        if is_finished(folder):
            check_undamaged(folder, experiment)
            return _already_finished(folder, experiment, console)
        tell(f"data: loading {experiment.data.name}", console)
        dataset = load_dataset(experiment.data)
        _check_sizes(experiment, dataset)
        with matmul_precision(experiment):
            tell("network: tracing it", console)
            networks = Networks.build(experiment, dataset)
            other = _float_stage(networks, folder, from_run, console)
            write_atomically(folder.config, to_yaml(experiment), error=RunFolderError)
            if other is not None:
                other.copy_to(folder)
            results = _run(networks, folder, console, command)
            analysis = _analyze_if_worse(networks, folder, results, console)
    print_results(results, console, reestimated=experiment.qat.reestimate_batch_norm)
    say(f"report: {folder.report}", console)
    if analysis is not None:
        print_advice(analysis, experiment.quant, console, f"jaxqat quantize {folder.path}")
    return results


def _analyze_if_worse(
    networks: Networks, folder: RunFolder, results: Results, console: Console
) -> Analysis | None:
    """Analyze the network of QAT if it is worse than FP32 by more than a point."""
    tested = results.integer or results.qat
    if tested is None or not is_worse(results.fp32.test.accuracy, tested.test.accuracy):
        return None
    return analyze_for_advice(networks, restore_model(networks, folder, "qat"), console)


def _repair(folder: RunFolder, experiment: Experiment, console: Console) -> None:
    found = move_damaged_aside(folder, experiment)
    for problem in found:
        say(problem, console)
    if not found:
        say(f"{folder.path}: no checkpoint is damaged.", console)


def _already_finished(folder: RunFolder, experiment: Experiment, console: Console) -> Results:
    results = folder.read_results()
    say(f"{folder.path}: this run is finished; there is nothing to do.", console)
    if not folder.report.exists():
        write_report(folder.path)
    print_results(results, console, reestimated=experiment.qat.reestimate_batch_norm)
    return results


def _check_sizes(experiment: Experiment, dataset: Dataset) -> None:
    for name in TRAINED_STAGES:
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
        tell("FP32: continuing from this run's own checkpoints", console)
        return None
    other = find_float_stage(networks, Path(from_run))
    tell(f"FP32: starting from {from_run}", console)
    return other


def _announce(networks: Networks, runs: Mapping[str, StageRun], console: Console) -> None:
    """Print what is about to be done: network, data, steps."""
    experiment, dataset = networks.experiment, networks.dataset
    size = "x".join(map(str, dataset.image_shape))
    parameters = count_parameters(networks.shapes("fp32")[0])
    tell(f"network: {network_name(experiment.model)}, {parameters:,} parameters", console)
    held_out = "" if dataset.validation is None else f", {len(dataset.validation):,} validation"
    tell(
        f"data: {dataset.fingerprint['name']}, {len(dataset.train):,} training{held_out} and "
        f"{len(dataset.test):,} test images of {size}, {dataset.num_classes} classes",
        console,
    )
    mean, std = (", ".join(f"{v:.3f}" for v in values) for values in (dataset.mean, dataset.std))
    tell(f"normalization: mean {mean}, standard deviation {std}, of pixels in 0..1", console)
    change, given = networks.augmentation, experiment.augment
    done = [f"random crop after padding by {change.crop_padding}"] if change.crop_padding else []
    done += ["random flip"] if change.flip else []
    chosen = " (chosen for this data)" if change != given else ""
    tell(f"augmentation: {', '.join(done) or 'none'}{chosen}", console)
    for name, run in runs.items():
        tell(
            f"{name}: {counted(run.config.epochs, 'epoch')} of "
            f"{counted(run.steps_per_epoch, 'step')} of "
            f"{counted(run.config.batch_size, 'image')}, {counted(run.total_steps, 'step')} in all",
            console,
        )


def _run(networks: Networks, folder: RunFolder, console: Console, command: str | None) -> Results:
    _announce(
        networks, {name: StageRun.of(name, networks, folder) for name in TRAINED_STAGES}, console
    )
    compilation = find_compilation(networks, folder, console)
    runs = {name: StageRun.of(name, networks, folder, compilation) for name in TRAINED_STAGES}

    def initial() -> Model:
        tell("fp32: making the first weights", console)
        return Model(*networks.init())

    fp32 = runs["fp32"].train(initial, console=console)

    @functools.cache
    def start() -> Model:
        warn_unconverged(networks, fp32, console)
        return calibrated(networks, fp32, console)

    qat = runs["qat"].train(start, console=console)
    measured = {
        stage: _measure(runs[stage], model, console)
        for stage, model in (("fp32", fp32), ("qat", qat))
    }
    before = folder.find_results()
    results = float_results(networks, folder, qat, measured["fp32"], command)
    recipe = networks.experiment.quant
    results = results.with_network("qat", *stage_result(folder, "qat", measured["qat"], recipe))
    logits = {stage: found.logits for stage, found in measured.items()}
    results = _add_integer(results, networks, folder, qat, logits, console)
    if results.integer is not None:
        results = _add_ptq(results, before, networks, folder, start, console)
    tell("writing the results and the report", console)
    write_test_samples(folder, networks.dataset, results, logits)
    folder.write_results(results)
    write_report(folder.path)
    return results


def _add_integer(
    results: Results,
    networks: Networks,
    folder: RunFolder,
    qat: Model,
    logits: dict[str, np.ndarray],
    console: Console,
) -> Results:
    """Convert the network of QAT, test and verify it; add it to the results and its logits."""
    tell("integer: converting the network of QAT", console)
    try:
        graph = make_network(networks, folder, qat)
    except ConversionError as error:
        warn(f"this run has no integer network. {error}", console)
        return dataclasses.replace(results, conversion_error=str(error))
    note_islands(graph, console)
    measured = measure_network(networks, graph, "integer", console)
    logits["integer"] = measured.logits
    integer = IntegerResult(
        test=measured.scores,
        requantization=graph.requantization,
        step=qat.step,
        bits=bits_name(networks.experiment.quant),
    )
    return results.with_network(
        "integer",
        integer,
        Speed(evaluate_images_per_s=measured.images_per_s),
        verify=verification_result(check_network(networks, qat, graph, console)),
        size_bytes=dataclasses.replace(results.size_bytes, integer=graph.size_bytes()),
    )


def _add_ptq(
    results: Results,
    before: Results | None,
    networks: Networks,
    folder: RunFolder,
    start: Callable[[], Model],
    console: Console,
) -> Results:
    """Add post-training quantization to the results; keep those of an earlier `quantize`."""
    name = recipe_name(networks.experiment.quant)
    for each in folder.ptq_names():
        if before is not None and each in before.ptq:
            results = results.with_ptq(each, before.ptq[each], before.speed[f"ptq_{each}"])
    if name in results.ptq or not networks.experiment.qat.test_calibrated:
        return results
    try:
        graph, ptq, speed, _ = convert_and_test(networks, start(), name=name, console=console)
    except ConversionError as error:
        warn(f"this run has no integer network of post-training quantization. {error}", console)
        return results
    save_ptq(folder, graph)
    return results.with_ptq(name, ptq, speed)


def _measure(run: StageRun, model: Model, console: Console) -> Measured:
    """Measure a stage's network on the test split."""
    dataset, what = run.dataset, run.name
    return measure(
        run.predictor, dataset.test, dataset.class_names, model.tree(), what=what, console=console
    )
