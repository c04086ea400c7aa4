"""Post-training quantization of a run: calibrate, convert and test its float network.

Nothing is trained (Krishnamoorthi 2018, arXiv:1806.08342, section 3.1): the activation ranges come
from a few training batches, the weights from FP32. The integer network of a recipe is saved in
RUN/ptq/RECIPE, and its test scores are in 'ptq' of results.json. `train` ends with the same for its
own recipe, but does not verify the network, which would take longer than the rest.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from jaxqat.errors import InputError, RecipeError
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import Dataset
from jaxqat.pipeline.display import note_islands, warn
from jaxqat.pipeline.integer_networks import (
    check_recipe,
    convert_network,
    load_network,
    measure_network,
)
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.progress import Work
from jaxqat.pipeline.results import PtqResult, Speed
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.results import bits_name
from jaxqat.pipeline.run.snapshots import Model, check_step, restore_model
from jaxqat.pipeline.terminal import tell
from jaxqat.quant import Recipe


def calibrated(networks: Networks, fp32: Model, console: Console | None = None) -> Model:
    """Return the trained float network with activation ranges; QAT starts from it too."""
    images = networks.calibration_images
    collections = fp32.collections
    if networks.experiment.qat.reestimate_batch_norm:
        what = f"calibration: estimating batch norm's statistics on {images:,} images"
        with Work(console, what, images) as work:
            found = networks.batch_norm(fp32.params, collections, track=work.track)
        if found is None:
            raise InputError(
                "qat.reestimate_batch_norm is true, and the network has no batch norm: set it to "
                "false."
            )
        collections = {**collections, "batch_stats": found.statistics}
    with Work(console, f"calibration: observing ranges on {images:,} images", images) as work:
        ranges = networks.calibrate(fp32.params, collections, track=work.track)
    return Model(fp32.params, ranges, fp32.step)


def warn_unconverged(networks: Networks, fp32: Model, console: Console) -> None:
    """Warn if batch norm's statistics have not converged and are not estimated anew."""
    if networks.experiment.qat.reestimate_batch_norm:
        return
    images = networks.calibration_images
    what = f"calibration: checking batch norm's statistics on {images:,} images"
    with Work(console, what, images) as work:
        found = networks.batch_norm(fp32.params, fp32.collections, track=work.track)
    if found is not None and found.warning is not None:
        warn(
            f"{found.warning} Set qat.reestimate_batch_norm to true, or train FP32 longer.", console
        )


def check_static(recipe: Recipe, name: str) -> None:
    """Refuse a recipe whose activation ranges are dynamic: there would be nothing to calibrate.

    Raises:
        RecipeError: It names the recipe.
    """
    every = (recipe, *(rule.over(recipe) for rule in recipe.rules))
    if any(settings.act_range == "dynamic" for settings in every):
        raise RecipeError(
            f"the recipe {name!r} takes activation ranges from each input as it comes (act_range "
            "'dynamic'): there is nothing to calibrate, and no integer network with fixed scales. "
            "Choose a recipe with ranges from calibration, such as int8, int8_symmetric or w4a8."
        )


class Converted(NamedTuple):
    """An integer network of PTQ, its scores and speed, and its logits of the test images."""

    graph: IntegerGraph
    result: PtqResult
    speed: Speed
    logits: np.ndarray


def convert_and_test(networks: Networks, model: Model, *, name: str, console: Console) -> Converted:
    """Convert a calibrated network and test it.

    Args:
        networks: Networks of the experiment.
        model: The calibrated network.
        name: Name of the recipe.
        console: Shows the progress.

    Raises:
        ConversionError: Lists each part of the network that has no integer form, and the reason.
    """
    quant, qat = networks.experiment.quant, networks.experiment.qat
    tell(f"PTQ ({name}): converting to integers", console)
    graph = convert_network(
        networks, model, stage="ptq", ptq=name, calibration_batches=qat.calibration_batches
    )
    note_islands(graph, console)
    measured = measure_network(networks, graph, f"PTQ ({name})", console)
    result = PtqResult(
        test=measured.scores,
        requantization=graph.requantization,
        step=model.step,
        bits=bits_name(quant),
        calibration_batches=qat.calibration_batches,
        calibration_images=qat.calibration_batches * qat.batch_size,
        recipe=configs.to_dict(networks.experiment)["quant"],
        size_bytes=graph.size_bytes(),
    )
    speed = Speed(evaluate_images_per_s=measured.images_per_s)
    return Converted(graph, result, speed, measured.logits)


def experiment_of(experiment: Experiment, graph: IntegerGraph) -> Experiment:
    """Return the run's experiment with the recipe and the batches of an integer network of PTQ."""
    origin: Any = graph.metadata
    quant = configs.from_dict({"quant": origin["recipe"]}).quant
    return with_quantization(experiment, quant, origin["calibration_batches"])


def with_quantization(experiment: Experiment, quant: Recipe, batches: int) -> Experiment:
    """Return the experiment with another recipe and number of calibration batches."""
    qat = dataclasses.replace(experiment.qat, calibration_batches=batches)
    return dataclasses.replace(experiment, quant=quant, qat=qat)


def restore_quantized(
    folder: RunFolder,
    experiment: Experiment,
    dataset: Dataset,
    stage: str,
    recipe: str | None = None,
    console: Console | None = None,
) -> tuple[Networks, Model]:
    """Restore the quantized network of a stage, with its parameters and ranges.

    'qat' comes from its checkpoint. 'ptq' is the FP32 network, calibrated again: with the recipe
    and the batches of its integer network in RUN/ptq, as `quantize` can override those of the
    config, or with those of the config if RUN/ptq holds none.

    Args:
        folder: Run folder.
        experiment: Experiment of the run.
        dataset: Data of the run.
        stage: 'qat' or 'ptq'.
        recipe: Name of the recipe of PTQ; None as in `load_network`.
        console: Shows the progress.

    Raises:
        CheckpointError: If the checkpoint is damaged, or not the one that was converted.
        RunFolderError: If there are no checkpoints, or the run was trained on other data.
        ArtifactError: If RUN/ptq is damaged.
    """
    if stage == "qat":
        check_recipe(stage, recipe)
        tell(f"{stage}: tracing the network and restoring it", console)
        networks = Networks.build(experiment, dataset)
        model = restore_model(networks, folder, "qat")
        if folder.integer.is_dir():
            _check_step(folder, "qat", model, load_network(folder))
        return networks, model
    graph = None
    if folder.ptq_names() or recipe is not None:
        graph = load_network(folder, "ptq", recipe)
        experiment = experiment_of(experiment, graph)
    tell("fp32: tracing the network and restoring it", console)
    networks = Networks.build(experiment, dataset)
    fp32 = restore_model(networks, folder, "fp32")
    if graph is not None:
        _check_step(folder, "fp32", fp32, graph)
    return networks, calibrated(networks, fp32, console)


def _check_step(folder: RunFolder, stage: str, model: Model, graph: IntegerGraph) -> None:
    origin: Any = graph.metadata
    check_step(folder, stage, model, origin["step"])
