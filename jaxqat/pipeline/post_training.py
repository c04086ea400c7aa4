"""Post-training quantization of a run: its float network, calibrated, converted and tested.

Nothing is trained (Krishnamoorthi 2018, arXiv:1806.08342, section 3.1): the activation ranges come
from a few training batches, the weights are those of FP32. The integer network lies in RUN/ptq, its
scores on the test split stand in results.json under 'ptq'. `train` makes the same at its end, and
leaves out to verify it, which would take it longer than all else.
"""

import dataclasses
from typing import Any

from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.integer_networks import convert_network, measure_network
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.run.snapshots import Model
from jaxqat.pipeline.training import StopRequest
from jaxqat.quant import Recipe


def calibrated(networks: Networks, fp32: Model) -> Model:
    """The trained float network with activation ranges; QAT starts from it, too."""
    return Model(fp32.params, networks.calibrate(fp32.params, fp32.collections), fp32.step)


def examine(
    networks: Networks, model: Model, stop: StopRequest
) -> tuple[IntegerGraph, dict[str, Any]]:
    """Convert a calibrated network, test what came of it; and what results say of it.

    Raises:
        ConversionError: Names every part of the network that has no integer form, and why.
        Stopped: A signal came.
    """
    config = networks.experiment
    graph = convert_network(
        networks, model, stage="ptq", calibration_batches=config.qat.calibration_batches
    )
    stop.raise_if_set()
    metrics, images_per_s = measure_network(networks, graph)
    stop.raise_if_set()
    return graph, {
        "ptq": {
            "test": metrics,
            "requantization": graph.requantization,
            "step": model.step,
            "calibration_batches": config.qat.calibration_batches,
            "calibration_images": config.qat.calibration_batches * config.qat.batch_size,
            "preset": None,
            "recipe": graph.metadata["recipe"],
            "size_bytes": graph.size_bytes(),
        },
        "speed": {"ptq": {"evaluate_images_per_s": images_per_s}},
    }


def experiment_of(experiment: Experiment, graph: IntegerGraph) -> Experiment:
    """The run's experiment with the recipe and the calibration that RUN/ptq was made by."""
    origin: Any = graph.metadata
    quant = configs.from_dict({"quant": origin["recipe"]}).quant
    return _changed(experiment, quant, origin["calibration_batches"])


def _changed(experiment: Experiment, quant: Recipe, batches: int) -> Experiment:
    qat = dataclasses.replace(experiment.qat, calibration_batches=batches)
    return dataclasses.replace(experiment, quant=quant, qat=qat)
