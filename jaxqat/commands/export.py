"""`jaxqat export`: write the integer network of a run for another runtime, or as a web page.

Packages for the file formats are imported only when needed, as training does not need them.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from jaxqat.bench.networks import are_usable, make_images, run_pixels
from jaxqat.errors import InputError
from jaxqat.export._certificate import check_folder, export_certificate
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.integer_networks import load_network
from jaxqat.pipeline.report.gallery import to_image
from jaxqat.pipeline.report.samples import read_samples
from jaxqat.pipeline.report.theme import encode_png
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.terminal import say, tell

GOLDEN = 4  # Test images in a certificate, and as many of noise.


def export(
    run: Path,
    output: Path,
    *,
    format: Literal["onnx", "stablehlo", "web"],
    stage: Literal["qat", "ptq"] = "qat",
    recipe: str | None = None,
    input: Literal["uint8", "float"] = "uint8",
    certificate: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write the integer network of a run as an ONNX or StableHLO file, or as a web page.

    The page classifies images in the browser, by the integer network and by the same weights in
    float32. It takes onnxruntime-web from node_modules of this folder or of one above, else from
    its public address.

    Args:
        run: Run folder.
        output: File to write; for web, a folder.
        format: Format of the file, or web for a static page.
        stage: Stage that made the integer network: quantization-aware training (qat) or
            post-training quantization (ptq).
        recipe: Recipe of the network of post-training quantization, for a run with several; by
            default that of the run, or the only one.
        input: Input of the exported network: raw pixels (uint8), or images normalized as in
            training (float). A page takes raw pixels.
        certificate: Write a certificate too, OUTPUT.certificate (in a page, certificate): golden
            inputs, the SHA-256 of every tensor's codes, and replay.py, which runs the file
            elsewhere, without jaxqat, and names the first tensor that differs.
        overwrite: Replace an existing file, or write into a folder that holds files.
        console: Where path and size are printed; None for standard output.

    Returns:
        Path of the file or folder.

    Raises:
        InputError: If a page is asked to take float input.
        RunFolderError: If the folder is not a run folder, or holds no such integer network.
        ArtifactError: If the integer network is damaged.
        ExportError: If the format cannot express the network, or the file cannot be written.
        WrongProductError: If the compiled network is not what NumPy computes, so that there is
            nothing to certify.
        MissingPackageError: If a package is not installed.
    """
    console = console or Console()
    folder = RunFolder(Path(run))
    folder.load_config()
    graph = load_network(folder, stage, recipe)
    output = Path(output)
    beside = output.with_name(f"{output.name}.certificate")
    if certificate and format != "web":
        check_folder(beside, overwrite)
    if format == "web":
        _write_page(folder, graph, output, input, overwrite, console)
        if certificate:
            target, file = output / "certificate", output / "integer.onnx"
            _write_certificate(folder, graph, target, file, input, console)
        return output
    if format == "onnx":
        from jaxqat.export._onnx.model import export_onnx as write
    else:
        from jaxqat.export._stablehlo import export_stablehlo as write
    tell(f"writing {output}", console)
    write(graph, output, input=input, overwrite=overwrite)
    say(f"{output}: {output.stat().st_size:,} bytes", console)
    if certificate:
        _write_certificate(folder, graph, beside, output, input, console)
    return output


def _write_certificate(
    folder: RunFolder,
    graph: IntegerGraph,
    target: Path,
    file: Path,
    input: str,
    console: Console,
) -> None:
    tell(f"writing {target}", console)
    export_certificate(graph, target, _golden(folder, graph, input), file=file, overwrite=True)
    say(f"{target}: check the file anywhere by python {target / 'replay.py'}", console)


def _golden(folder: RunFolder, graph: IntegerGraph, input: str) -> np.ndarray:
    """Return inputs that show errors: test images of the report, and noise of all values."""
    noise = np.random.default_rng(0).integers(0, 256, (GOLDEN, *graph.input_shape), np.uint8)
    pixels = run_pixels(folder.path)
    if pixels is not None and are_usable(graph, pixels):
        noise = np.concatenate([pixels[:GOLDEN], noise])
    return noise if input == "uint8" else make_images(graph, len(noise), noise)


def _write_page(
    folder: RunFolder,
    graph: IntegerGraph,
    output: Path,
    input: str,
    overwrite: bool,
    console: Console,
) -> Path:
    if input != "uint8":
        raise InputError("--format web takes raw pixels: leave out --input float.")
    from jaxqat.export._web.page import CDN, export_web, find_runtime

    runtime, samples = find_runtime(), read_samples(folder.path)
    examples = []
    if samples is not None:
        for i in samples.samples:
            label, image = samples.class_names[samples.labels[i]], to_image(samples.images[i])
            examples.append((label, encode_png(image)))
    reason = export_web(graph, output, examples=examples, runtime=runtime, overwrite=overwrite)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    say(f"{output}: {size:,} bytes", console)
    say(f"onnxruntime-web: {'copied from ' + str(runtime) if runtime else CDN}", console)
    if reason is not None:
        say(f"without the network in float32: {reason}", console)
    say(f"to open it: python -m http.server --directory {output}", console)
    return output
