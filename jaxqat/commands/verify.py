"""`jaxqat verify`: compare every code of a run's integer network with its origin."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from jaxqat.integer._execute.executor import make_executor
from jaxqat.integer._verify import Network, Observation, Verification, compare, integer_network
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.data import Dataset, Split, load_dataset
from jaxqat.pipeline.display import print_verification
from jaxqat.pipeline.evaluation import find_split
from jaxqat.pipeline.integer_networks import (
    check_network_data,
    in_batches,
    load_network,
    verify_network,
)
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.post_training import calibrated, experiment_of
from jaxqat.pipeline.results import to_json
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.results import describe_run, verification_result
from jaxqat.pipeline.run.snapshots import restore_model

# What `verify` compares the integer network with, by its format.
AGAINST = {None: "the training graph", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def verify(
    workdir: Path,
    *,
    format: Literal["onnx", "openvino"] | None = None,
    stage: Literal["qat", "ptq"] = "qat",
    split: str = "test",
    console: Console | None = None,
) -> Verification:
    """Compare every code of the integer network of a run with another form of it, on images.

    Without a format that is the trained network in inference mode, from the checkpoint of QAT (of
    'ptq', from that of FP32, calibrated again), and real values are those of the same weights in
    float; with 'onnx' it is the exported file in ONNX
    Runtime; with 'openvino' that file in OpenVINO, which fuses what it would otherwise show, so
    that only the classes are compared. Writes RUN/evaluations/verify_SPLIT.json, or with 'ptq' and
    the format before SPLIT, and nothing else.

    Args:
        workdir: The run folder.
        format: What to compare with.
        stage: 'qat', or 'ptq' for the network of post-training quantization.
        split: 'test', 'train' or 'validation'.
        console: Where the comparison is shown; None for standard output.

    Returns:
        The comparison; its `failures` say how the contract is broken, if it is.

    Raises:
        RunFolderError: It is no run folder, or has no integer network.
        DataError: The data is missing, damaged or another than the run's.
        CheckpointError: There is no checkpoint, or it is damaged.
        ArtifactError: The integer network is damaged.
        ExportError: The network has no ONNX form.
        ImportError: A package is not installed.
    """
    folder = RunFolder(Path(workdir))
    experiment = folder.load_config()
    graph = load_network(folder, stage)
    dataset = load_dataset(experiment.data)
    images = find_split(dataset, split)
    check_network_data(folder, graph, dataset)
    if format is not None:
        verification = _against_export(graph, images, format)
    else:
        verification = _against_training(folder, graph, dataset, images, stage)
    of = "ptq" if stage == "ptq" else None
    compared = "the integer network" + (" of post-training quantization" if of else "")
    of_what = f"{compared} and {AGAINST[format]}, {split} split"
    counted = verification_result(verification)
    print_verification(f"{experiment.name}: {of_what}", counted, console or Console())
    info = describe_run(experiment, dataset, None)
    result = {**to_json(info), "of": of_what, **to_json(counted)}
    folder.write_evaluation("_".join(filter(None, ("verify", of, format, split))), result)
    return verification


def _against_training(
    folder: RunFolder, graph: IntegerGraph, dataset: Dataset, images: Split, stage: str
) -> Verification:
    experiment = folder.load_config()
    with matmul_precision(experiment):
        if stage == "ptq":
            networks = Networks.build(experiment_of(experiment, graph), dataset)
            model = calibrated(networks, restore_model(networks, folder, "fp32"))
        else:
            networks = Networks.build(experiment, dataset)
            model = restore_model(networks, folder, "qat")
        return verify_network(networks, model, graph, images)


def _against_export(graph: IntegerGraph, images: Split, format: str) -> Verification:
    from jaxqat.export._onnx.builder import library
    from jaxqat.export._onnx.model import onnx_model

    library("onnxruntime" if format == "onnx" else "openvino")  # Before minutes of work.
    model = onnx_model(graph, input="uint8")
    exported = _in_onnx_runtime(model) if format == "onnx" else _in_openvino(model)
    deployed = integer_network(make_executor(graph))
    return compare(deployed, exported, graph, in_batches(images))


def _in_onnx_runtime(model: Any) -> Network:
    from jaxqat.export._onnx.runtime import make_runner

    run = make_runner(model.SerializeToString(), expose=True)

    def exported(batch: np.ndarray) -> Observation:
        logits, codes = run(batch)
        return Observation(codes, logits)

    return exported


def _in_openvino(model: Any) -> Network:
    from jaxqat.export._onnx.openvino import compile_openvino

    run = compile_openvino(model)
    return lambda batch: Observation({}, run(batch))
