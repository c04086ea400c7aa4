"""Post-training quantization of a run: calibrate, convert and test its float network.

Nothing is trained (Krishnamoorthi 2018, arXiv:1806.08342, section 3.1): the activation ranges come
from a few training batches, the weights from FP32. The integer network is saved in RUN/ptq, its
test scores are 'ptq' in results.json. `train` ends with the same, but does not verify the network,
which would take longer than the rest.
"""

import dataclasses
from typing import Any

from rich.console import Console

from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import Dataset
from jaxqat.pipeline.display import warn
from jaxqat.pipeline.integer_networks import convert_network, load_network, measure_network
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.results import PtqResult, Speed
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.results import bits_name
from jaxqat.pipeline.run.snapshots import Model, restore_model
from jaxqat.pipeline.training import StopRequest
from jaxqat.quant import Recipe


def calibrated(networks: Networks, fp32: Model) -> Model:
    """Return the trained float network with activation ranges; QAT starts from it too."""
    collections = fp32.collections
    if networks.experiment.qat.reestimate_batch_norm:
        found = networks.batch_norm(fp32.params, collections)
        collections = {**collections, "batch_stats": found.statistics}
    return Model(fp32.params, networks.calibrate(fp32.params, collections), fp32.step)


def warn_unconverged(networks: Networks, fp32: Model, console: Console) -> None:
    """Warn if batch norm's statistics have not converged and are not estimated anew."""
    if networks.experiment.qat.reestimate_batch_norm:
        return
    warning = networks.batch_norm(fp32.params, fp32.collections).warning
    if warning is not None:
        warn(f"{warning} Set qat.reestimate_batch_norm to true, or train FP32 longer.", console)


def convert_and_test(
    networks: Networks, model: Model, stop: StopRequest, *, preset: str | None = None
) -> tuple[IntegerGraph, PtqResult, Speed]:
    """Convert a calibrated network and test it.

    Args:
        networks: Networks of the experiment.
        model: The calibrated network.
        stop: Checked after conversion and after the test.
        preset: Name of the recipe's preset, if there is one.

    Raises:
        ConversionError: Lists each part of the network that has no integer form, and the reason.
        Stopped: A signal came.
    """
    quant, qat = networks.experiment.quant, networks.experiment.qat
    graph = convert_network(
        networks, model, stage="ptq", calibration_batches=qat.calibration_batches
    )
    stop.raise_if_set()
    measured = measure_network(networks, graph)
    stop.raise_if_set()
    result = PtqResult(
        test=measured.scores,
        requantization=graph.requantization,
        step=model.step,
        bits=bits_name(quant),
        calibration_batches=qat.calibration_batches,
        calibration_images=qat.calibration_batches * qat.batch_size,
        preset=preset,
        recipe=configs.to_dict(networks.experiment)["quant"],
        size_bytes=graph.size_bytes(),
    )
    return graph, result, Speed(evaluate_images_per_s=measured.images_per_s)


def experiment_of(experiment: Experiment, graph: IntegerGraph) -> Experiment:
    """Return the run's experiment with the recipe and the calibration batches of RUN/ptq."""
    origin: Any = graph.metadata
    quant = configs.from_dict({"quant": origin["recipe"]}).quant
    return with_quantization(experiment, quant, origin["calibration_batches"])


def with_quantization(experiment: Experiment, quant: Recipe, batches: int) -> Experiment:
    """Return the experiment with another recipe and number of calibration batches."""
    qat = dataclasses.replace(experiment.qat, calibration_batches=batches)
    return dataclasses.replace(experiment, quant=quant, qat=qat)


def restore_quantized(
    folder: RunFolder, experiment: Experiment, dataset: Dataset, stage: str
) -> tuple[Networks, Model]:
    """Restore the quantized network of a stage, with its parameters and ranges.

    'qat' comes from its checkpoint. 'ptq' is the FP32 network, calibrated again: with the recipe
    and the batches of RUN/ptq, as `quantize` can override those of the config, or with those of the
    config if there is no RUN/ptq.

    Args:
        folder: Run folder.
        experiment: Experiment of the run.
        dataset: Data of the run.
        stage: 'qat' or 'ptq'.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        RunFolderError: If there are no checkpoints, or the run was trained on other data.
        ArtifactError: If RUN/ptq is damaged.
    """
    if stage == "qat":
        networks = Networks.build(experiment, dataset)
        return networks, restore_model(networks, folder, "qat")
    if folder.ptq.is_dir():
        experiment = experiment_of(experiment, load_network(folder, "ptq"))
    networks = Networks.build(experiment, dataset)
    return networks, calibrated(networks, restore_model(networks, folder, "fp32"))
