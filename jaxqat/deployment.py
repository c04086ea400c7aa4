"""What is done with the integer network of a run: verify it, export it, see how it is compiled.

Each function is a command of the command line, and loads the package that it needs when it is
called: none of them is needed to train.
"""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxqat.benchmark.networks import WIDTH, random_network
from jaxqat.conversion import check_network_data, in_batches, load_network, verify_network
from jaxqat.data import Dataset, Split, load_dataset
from jaxqat.display import print_verification
from jaxqat.evaluation import find_split
from jaxqat.integer.execute import LOWERINGS, make_executor
from jaxqat.integer.graph import IntegerGraph
from jaxqat.integer.pallas_conv import COMPUTE_CAPABILITY
from jaxqat.integer.verify import Network, Observation, Verification, compare, integer_network
from jaxqat.lowering import Compiled, LoweringError, Target, compile_for, print_lowering
from jaxqat.lowering.targets import get_target
from jaxqat.networks import Networks, matmul_precision
from jaxqat.post_training import calibrated, experiment_of
from jaxqat.results import describe_run
from jaxqat.runfolder import RunFolder
from jaxqat.snapshots import restore_model

INPUTS = ("uint8", "float")
FORMATS = ("onnx", "stablehlo")
# What `verify` compares the integer network with, by its format.
AGAINST = {None: "the training graph", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def export(
    workdir: Path,
    output: Path,
    *,
    format: Literal["onnx", "stablehlo"],
    network: str = "int8",
    input: Literal["uint8", "float"] = "uint8",
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write the integer network of a run as a file for another runtime.

    Args:
        workdir: The run folder.
        output: File to write.
        format: 'onnx' or 'stablehlo'.
        network: 'int8', that of QAT, or 'ptq', that of post-training quantization.
        input: What the file takes: 'uint8', images as they are, or 'float', images normalized as
            in training.
        overwrite: Whether a file of that name may be replaced.
        console: Where the file is named; None for standard output.

    Raises:
        RunFolderError: It is no run folder, or has no integer network.
        ArtifactError: The integer network is damaged.
        ExportError: The network has no such form, or the file cannot be written.
        ImportError: A package is not installed.
    """
    console = console or Console()
    graph = load_run_network(workdir, network)
    if format == "onnx":
        from jaxqat.export.onnx import export_onnx as write
    else:
        from jaxqat.export.stablehlo import export_stablehlo as write
    output = Path(output)
    write(graph, output, input=input, overwrite=overwrite)
    console.print(f"{output}: {output.stat().st_size:,} bytes", highlight=False, soft_wrap=True)
    return output


def verify(
    workdir: Path,
    *,
    format: Literal["onnx", "openvino"] | None = None,
    network: str = "int8",
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
        network: 'int8', that of QAT, or 'ptq', that of post-training quantization.
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
    graph = load_network(folder, network)
    dataset = load_dataset(experiment.data)
    images = find_split(dataset, split)
    check_network_data(folder, graph, dataset)
    if format is not None:
        verification = _against_export(graph, images, format)
    else:
        verification = _against_training(folder, graph, dataset, images, network)
    of = "ptq" if network == "ptq" else None
    compared = "the integer network" + (" of post-training quantization" if of else "")
    result = {
        **describe_run(experiment, dataset, None),
        "of": f"{compared} and {AGAINST[format]}, {split} split",
        **verification.to_dict(),
    }
    print_verification(result, console or Console())
    folder.write_evaluation("_".join(filter(None, ("verify", of, format, split))), result)
    return verification


def _against_training(
    folder: RunFolder, graph: IntegerGraph, dataset: Dataset, images: Split, network: str
) -> Verification:
    experiment = folder.load_config()
    with matmul_precision(experiment):
        if network == "ptq":
            networks = Networks.build(experiment_of(experiment, graph), dataset)
            model = calibrated(networks, restore_model(networks, folder, "fp32"))
        else:
            networks = Networks.build(experiment, dataset)
            model = restore_model(networks, folder, "qat")
        return verify_network(networks, model, graph, images)


def _against_export(graph: IntegerGraph, images: Split, format: str) -> Verification:
    from jaxqat.export.onnx import onnx_model
    from jaxqat.export.onnx_builder import library

    library("onnxruntime" if format == "onnx" else "openvino")  # Before minutes of work.
    model = onnx_model(graph, input="uint8")
    exported = _in_onnx_runtime(model) if format == "onnx" else _in_openvino(model)
    deployed = integer_network(make_executor(graph))
    return compare(deployed, exported, graph, in_batches(images))


def _in_onnx_runtime(model: Any) -> Network:
    from jaxqat.export.onnx_run import make_runner

    run = make_runner(model.SerializeToString(), expose=True)

    def exported(batch: np.ndarray) -> Observation:
        logits, codes = run(batch)
        return Observation(codes, logits)

    return exported


def _in_openvino(model: Any) -> Network:
    from jaxqat.export.openvino import compile_openvino

    run = compile_openvino(model)
    return lambda batch: Observation({}, run(batch))


def lowering(
    workdir: Path | None,
    *,
    target: str,
    executor: str | None = None,
    batch_size: int = 256,
    width: int | None = None,
    console: Console | None = None,
) -> Compiled:
    """Compile an integer network for a device that need not be there, and show its kernels.

    Args:
        workdir: The run folder; None for a ResNet-18 with random weights.
        target: A name of `jaxqat.lowering.TARGETS`.
        executor: A way to run on it, of `jaxqat.integer.execute.LOWERINGS`; None for what
            `make_executor` would take on such a device.
        batch_size: Images at a time.
        width: Of the ResNet-18, where no run is given; None for 64.
        console: Where the table is shown; None for standard output.

    Raises:
        RunFolderError: It is no run folder, or has no integer network.
        ArtifactError: The integer network is damaged.
        LoweringError: The target cannot run so, its compiler is not installed, or refuses.
    """
    name = _executor_for(get_target(target), executor)
    if workdir is not None and width is not None:
        raise LoweringError(
            f"width is of the random ResNet-18; {workdir} has a network of its own."
        )
    graph = random_network(width or WIDTH) if workdir is None else load_run_network(workdir)
    runner = make_executor(graph, platform=name)
    images = jax.ShapeDtypeStruct((batch_size, *graph.input_shape), jnp.uint8)
    compiled = compile_for(
        target, runner.apply, runner.parameters, images, compiler_options=runner.compiler_options
    )
    print_lowering(compiled, console or Console())
    return compiled


def _executor_for(target: Target, executor: str | None) -> str:
    if executor is None:
        pallas = target.gpu is not None and target.gpu.capability >= COMPUTE_CAPABILITY
        return "cuda_pallas" if pallas else target.platform
    fitting = [name for name in LOWERINGS if name.split("_")[0] == target.platform]
    if executor not in fitting:
        raise LoweringError(
            f"executor must be one of {', '.join(fitting)} for {target.name}, got {executor!r}."
        )
    return executor


def load_run_network(workdir: Path, network: str = "int8") -> IntegerGraph:
    """The integer network of a run folder, or that of post-training quantization, 'ptq'.

    Raises:
        RunFolderError: It is no run folder, or has no integer network.
        ArtifactError: The integer network is damaged.
    """
    folder = RunFolder(Path(workdir))
    folder.load_config()
    return load_network(folder, network)
