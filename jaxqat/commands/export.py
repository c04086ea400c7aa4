"""`jaxqat export`: write the integer network of a run for another runtime.

Packages for the file formats are imported only when needed, as training does not need them.
"""

from pathlib import Path
from typing import Literal

from rich.console import Console

from jaxqat.pipeline.integer_networks import load_network
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.terminal import say, tell


def export(
    run: Path,
    output: Path,
    *,
    format: Literal["onnx", "stablehlo"],
    stage: Literal["qat", "ptq"] = "qat",
    recipe: str | None = None,
    input: Literal["uint8", "float"] = "uint8",
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write the integer network of a run as an ONNX or StableHLO file.

    Args:
        run: Run folder.
        output: File to write.
        format: Format of the file.
        stage: Stage that made the integer network: quantization-aware training (qat) or
            post-training quantization (ptq).
        recipe: Recipe of the network of post-training quantization, for a run with several; by
            default that of the run, or the only one.
        input: Input of the exported network: raw pixels (uint8), or images normalized as in
            training (float).
        overwrite: Replace an existing file.
        console: Where path and size are printed; None for standard output.

    Returns:
        Path of the file.

    Raises:
        RunFolderError: If the folder is not a run folder, or holds no such integer network.
        ArtifactError: If the integer network is damaged.
        ExportError: If the format cannot express the network, or the file cannot be written.
        MissingPackageError: If a package is not installed.
    """
    console = console or Console()
    folder = RunFolder(Path(run))
    folder.load_config()
    graph = load_network(folder, stage, recipe)
    if format == "onnx":
        from jaxqat.export._onnx.model import export_onnx as write
    else:
        from jaxqat.export._stablehlo import export_stablehlo as write
    output = Path(output)
    tell(f"writing {output}", console)
    write(graph, output, input=input, overwrite=overwrite)
    say(f"{output}: {output.stat().st_size:,} bytes", console)
    return output
