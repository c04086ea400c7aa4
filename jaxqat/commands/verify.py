"""`jaxqat verify`: compare every code of a run's integer network with its reference."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from jaxqat.errors import InputError
from jaxqat.integer._compare import Network, Observation, Verification, compare
from jaxqat.integer._execute.executor import make_executor
from jaxqat.integer._verify import integer_network
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.data import Split, load_dataset
from jaxqat.pipeline.display import (
    console_for,
    keep_evaluation,
    print_json,
    print_verification,
    warn,
)
from jaxqat.pipeline.evaluation import find_split
from jaxqat.pipeline.integer_networks import (
    check_network_data,
    in_batches,
    load_network,
    verify_network,
    verifying,
)
from jaxqat.pipeline.measurements import Comparison, SplitName
from jaxqat.pipeline.networks import matmul_precision
from jaxqat.pipeline.post_training import restore_quantized
from jaxqat.pipeline.results import Environment
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.results import describe_run, verification_result
from jaxqat.pipeline.terminal import tell

# The reference for each value of the option `format`.
REFERENCES = {None: "the training graph", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def verify(
    run: Path,
    *,
    stage: Literal["qat", "ptq"] = "qat",
    recipe: str | None = None,
    format: Literal["onnx", "openvino"] | None = None,
    split: SplitName = "test",
    images: int | None = None,
    json: bool = False,
    console: Console | None = None,
) -> Verification:
    """Compare every code of the integer network with the network it was converted from.

    Without a format, the quantized network in inference mode is the reference. It is computed here:
    if codes differ, and the network was made on another device, a warning says so. The exit status
    is 1 if codes differ by more than one, or in 1 of 100,000 places or more, if an image changes
    its class, or if results differ although no code does. Only RUN/evaluations/verify_SPLIT.json is
    written, with ptq_RECIPE and the format before SPLIT if they are given.

    Args:
        run: Run folder.
        stage: Stage that made the integer network: quantization-aware training (qat) or
            post-training quantization (ptq).
        recipe: Recipe of the network of post-training quantization, for a run with several; by
            default that of the run, or the only one.
        format: Compare with the exported file instead, run by ONNX Runtime (onnx) or OpenVINO
            (openvino). OpenVINO fuses layers and gives no codes, so only classes are compared.
        split: Images to compare on.
        images: Number of images, 1 or more, counted from the first of the split; by default all.
        json: Print the content of the file as JSON on standard output, and all else on standard
            error.
        console: Where the comparison is printed; None for standard output.

    Returns:
        The comparison. Its `failures` list the conditions above that do not hold.

    Raises:
        InputError: `images` is below 1.
        RunFolderError: If the folder is not a run folder, holds no such integer network, or was
            trained on other data.
        DataError: If the data is missing or damaged.
        CheckpointError: If the checkpoint is damaged.
        ArtifactError: If the integer network is damaged.
        ExportError: If ONNX cannot express the network.
        MissingPackageError: If a package is not installed.
    """
    if images is not None and images < 1:
        raise InputError(f"--images must be 1 or more, got {images!r}.")
    console = console_for(console, as_json=json)
    folder = RunFolder(Path(run))
    experiment = folder.load_config()
    graph = load_network(folder, stage, recipe)
    tell(f"data: loading {experiment.data.name}", console)
    dataset = load_dataset(experiment.data)
    chosen = find_split(dataset, split)
    if images is not None:
        chosen = chosen.take(np.arange(min(images, len(chosen))))
    check_network_data(folder, graph, dataset)
    if format is not None:
        verification = _against_export(graph, chosen, format, console)
    else:
        with matmul_precision(experiment):
            networks, model = restore_quantized(folder, experiment, dataset, stage, recipe, console)
            verification = verify_network(networks, model, graph, chosen, console=console)
    compared = "the integer network"
    if stage == "ptq":
        compared += f" of post-training quantization ({graph.metadata['ptq']})"
    networks_compared = f"{compared} and {REFERENCES[format]}, {split} split"
    counted = verification_result(verification)
    print_verification(f"{experiment.name}: {networks_compared}", counted, console)
    info = describe_run(experiment, dataset, None)
    result = Comparison(**vars(info), **vars(counted), of=networks_compared)
    name = None if stage == "qat" else f"ptq_{graph.metadata['ptq']}"
    parts = ("verify", name, format, split)
    if json:
        print_json(result)
    keep_evaluation(folder, "_".join(filter(None, parts)), result, console)
    if verification.differing and format is None:
        _name_another_device(folder, info.environment, console)
    return verification


def _name_another_device(folder: RunFolder, here: Environment, console: Console) -> None:
    """Warn if the run's networks were made on another device, or with another XLA."""
    results = folder.find_results()
    if results is not None and results.environment.arithmetic != here.arithmetic:
        warn(
            f"the network was made on {results.environment.arithmetic}, and its reference was "
            f"computed here, on {here.arithmetic}. If they round functions of parameters "
            "differently, scales differ in their last bits, and then some codes. To rule that out, "
            "verify the run where it was made.",
            console,
        )


def _against_export(
    graph: IntegerGraph, images: Split, format: str, console: Console
) -> Verification:
    from jaxqat.export._onnx.builder import library
    from jaxqat.export._onnx.model import onnx_model

    # Raise for a missing package now, and not after minutes of work.
    library("onnxruntime" if format == "onnx" else "openvino")
    model = onnx_model(graph, input="uint8")
    exported = _in_onnx_runtime(model) if format == "onnx" else _in_openvino(model)
    deployed = integer_network(make_executor(graph))
    with verifying(images, console) as work:
        return compare(deployed, exported, graph, work.track(in_batches(images)))


def _in_onnx_runtime(model: Any) -> Network:
    from jaxqat.export._onnx.runtime import make_runner

    run = make_runner(model.SerializeToString(), expose=True)

    def exported(batch: np.ndarray) -> Observation:
        logits, codes = run(batch)
        return Observation(codes, [logits])

    return exported


def _in_openvino(model: Any) -> Network:
    from jaxqat.export._onnx.openvino import compile_openvino

    run = compile_openvino(model)
    return lambda batch: Observation({}, [run(batch)])
