"""What is done with the integer network of a run: verify it, export it, see how it is compiled.

Each function is a command of the command line, and loads the package that it needs when it is
called: none of them is needed to train.
"""

from pathlib import Path
from typing import Literal

from rich.console import Console

from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.integer_networks import load_network
from jaxqat.pipeline.run.folder import RunFolder

INPUTS = ("uint8", "float")


FORMATS = ("onnx", "stablehlo")


def export(
    workdir: Path,
    output: Path,
    *,
    format: Literal["onnx", "stablehlo"],
    stage: Literal["qat", "ptq"] = "qat",
    input: Literal["uint8", "float"] = "uint8",
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write the integer network of a run as a file for another runtime.

    Args:
        workdir: The run folder.
        output: File to write.
        format: 'onnx' or 'stablehlo'.
        stage: 'qat', or 'ptq' for the network of post-training quantization.
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
    graph = load_run_network(workdir, stage)
    if format == "onnx":
        from jaxqat.export._onnx.model import export_onnx as write
    else:
        from jaxqat.export._stablehlo import export_stablehlo as write
    output = Path(output)
    write(graph, output, input=input, overwrite=overwrite)
    console.print(f"{output}: {output.stat().st_size:,} bytes", highlight=False, soft_wrap=True)
    return output


def load_run_network(workdir: Path, stage: str = "qat") -> IntegerGraph:
    """The integer network of a run folder, or that of post-training quantization, 'ptq'.

    Raises:
        RunFolderError: It is no run folder, or has no integer network.
        ArtifactError: The integer network is damaged.
    """
    folder = RunFolder(Path(workdir))
    folder.load_config()
    return load_network(folder, stage)
