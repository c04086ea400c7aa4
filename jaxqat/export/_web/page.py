"""Write the page: two ONNX files, their description in network.json, and the page's own files.

    index.html, page.js, style.css    the same for every network
    network.json                      labels, input, files of the networks, address of the runtime
    integer.onnx, float32.onnx        the networks
    examples/*.png                    images to begin with
    onnxruntime-web/                  the runtime, if it was installed here

Browsers load modules only from a server: `python -m http.server --directory FOLDER`.
"""

import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxqat.errors import ExportError
from jaxqat.export._onnx.builder import library
from jaxqat.export._onnx.float_network import float_model
from jaxqat.export._onnx.model import export_onnx
from jaxqat.integer._store.files import write_atomically, write_json
from jaxqat.integer.graph import IntegerGraph

PAGE = "index.html"
_FILES = ("page.js", "style.css", PAGE)  # The page last: without it there is nothing to open.
PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"  # The version that was tested.
CDN = f"https://cdn.jsdelivr.net/npm/{PACKAGE}@{VERSION}/dist"
MODULE = "ort.wasm.min.mjs"
_RUNTIME = (MODULE, "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def find_runtime(start: Path | None = None) -> Path | None:
    """Return the folder of an installed onnxruntime-web, as Node finds it; None without one.

    Args:
        start: Folder to start from, then its parents; None for the current one.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        found = folder / "node_modules" / PACKAGE / "dist"
        if all((found / name).is_file() for name in _RUNTIME):
            return found
    return None


def export_web(
    graph: IntegerGraph,
    folder: Path,
    *,
    examples: Sequence[tuple[str, bytes]] = (),
    runtime: Path | None = None,
    overwrite: bool = False,
) -> str | None:
    """Write a page that classifies images by an integer network, and by the same one in float32.

    Args:
        graph: Network of one result that takes uint8 images, with the names of its classes as
            metadata 'labels'. If its metadata hold 'normalization', as those of runs do, the page
            also has the network in float32: the same weights, without rounding.
        folder: Folder to write; its parent must exist.
        examples: True class and PNG file of images that the page offers.
        runtime: Folder `dist` of onnxruntime-web, which is copied; None for its public address.
        overwrite: Whether to write into a folder that holds files.

    Returns:
        Why there is no network in float32; None if there is one.

    Raises:
        ExportError: If the network is no classifier of images, ONNX cannot represent it, or the
            folder holds files or cannot be written.
        MissingPackageError: If the package `onnx` is not installed.
    """
    _check(graph, folder, overwrite)
    library("onnx")  # Before anything is written.
    try:
        (folder / "examples").mkdir(parents=True, exist_ok=True)
        export_onnx(graph, folder / "integer.onnx", input="uint8", overwrite=True)
        networks = [_entry(folder, "integer.onnx", "integer", "uint8")]
        reason = _write_float(graph, folder)
        if reason is None:
            networks.append(_entry(folder, "float32.onnx", "float32", "float"))
        offered = [(f"examples/{i:02}.png", *example) for i, example in enumerate(examples)]
        for file, _, png in offered:
            write_atomically(folder / file, png, error=ExportError)
        address = f"{CDN}/{MODULE}" if runtime is None else _copy_runtime(runtime, folder)
        description = {
            "name": graph.metadata.get("name", "network"),
            "labels": graph.metadata.get("labels", ()),
            "shape": graph.input_shape,
            "normalization": graph.metadata.get("normalization"),
            "networks": networks,
            "examples": [{"file": file, "label": label} for file, label, _ in offered],
            "runtime": address,
        }
        write_json(folder / "network.json", description, error=ExportError)
        for name in _FILES:
            content = (resources.files("jaxqat.export._web") / name).read_text(encoding="utf-8")
            write_atomically(folder / name, content, error=ExportError)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return reason


def _check(graph: IntegerGraph, folder: Path, overwrite: bool) -> None:
    first, *others = graph.inputs
    if others or not graph.takes_uint8 or len(first.shape) != 3 or first.shape[2] not in (1, 3):
        taken = " and ".join(f"{each.type} of shape {each.shape}" for each in graph.inputs)
        raise ExportError(
            "The page needs a network of uint8 images of 1 or 3 channels: convert it with "
            f"`preprocess`, the normalization; this one takes {taken}"
            f"{' and uint8' if graph.takes_uint8 else ''}."
        )
    if len(graph.outputs) != 1 or len(graph.outputs[0].shape) != 1:
        shapes = [output.shape for output in graph.outputs]
        raise ExportError(f"The page needs a network whose result are logits, not {shapes}.")
    if not folder.parent.is_dir():
        raise ExportError(f"{folder}: the folder {folder.parent} does not exist.")
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder}: is a file; give the name of a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ExportError(
            f"{folder}: holds files; give another name or pass overwrite=True (--overwrite)."
        )


def _write_float(graph: IntegerGraph, folder: Path) -> str | None:
    """Write the network in float32; return the reason if it has none."""
    if not isinstance(graph.metadata.get("normalization"), Mapping):
        return "the network does not say how its input is normalized"
    try:
        model = float_model(graph)
    except ExportError as error:
        return str(error)
    write_atomically(folder / "float32.onnx", model.SerializeToString(), error=ExportError)
    return None


def _entry(folder: Path, file: str, name: str, input: str) -> dict[str, Any]:
    return {"name": name, "file": file, "input": input, "bytes": (folder / file).stat().st_size}


def _copy_runtime(runtime: Path, folder: Path) -> str:
    target = folder / PACKAGE
    target.mkdir(exist_ok=True)
    for name in _RUNTIME:
        shutil.copyfile(runtime / name, target / name)
    return f"./{PACKAGE}/{MODULE}"
