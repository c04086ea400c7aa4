# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Certificates: golden inputs, the SHA-256 of every tensor's codes, and a file that replays them.

    certificate.json    tensors in the order of the network: name, shape, digest, what makes them
    golden.npz          golden inputs, results and, if they are stored, codes
    replay.py           runs them in ONNX Runtime, OpenVINO or a runner of the user's own

`_replay` is that file; it needs nothing of jaxqat.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxqat
from jaxqat.errors import ExportError, RunError
from jaxqat.export._onnx.builder import library
from jaxqat.export._onnx.runtime import load_onnx
from jaxqat.export._replay import FORMAT, sha256
from jaxqat.integer._compare import LARGEST_RESULT_DIFFERENCE, MOST_DIFFERING_OF_ISLANDS
from jaxqat.integer._execute.executor import make_executor
from jaxqat.integer._guard import check_graph
from jaxqat.integer._numpy_products import codes as numpy_codes
from jaxqat.integer._numpy_products import real as numpy_real
from jaxqat.integer._numpy_products import sums, sums_of_pairs
from jaxqat.integer._results import flat
from jaxqat.integer._store.files import write_atomically
from jaxqat.integer.graph import FloatOp, IntegerGraph, MatMul, Product

Arrays = dict[str, np.ndarray[Any, Any]]

LIMITS = {
    # Of the codes that a float island makes, and of the largest of its results (`_compare`).
    "share": MOST_DIFFERING_OF_ISLANDS,
    "island_result": LARGEST_RESULT_DIFFERENCE,
    # A runtime may multiply a last sum by two factors in another order: some roundings of 2**-24.
    "result": 2.0**-20,
}


class WrongProductError(ExportError, RunError):
    """The compiled network is not the one that NumPy computes; the exit status is 1."""


def export_certificate(
    graph: IntegerGraph,
    folder: str | os.PathLike[str],
    inputs: Any,
    *,
    file: str | os.PathLike[str] | None = None,
    store_codes: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write what shows later, elsewhere and without jaxqat that a network computes the same codes.

    `python FOLDER/replay.py` runs the file on the golden inputs and names the first tensor that
    differs. The codes are those of the present device. Those of products are compared with NumPy's
    before anything is written, except codes of fixed-point networks and, on a GPU, of what is fused
    with an addition.

    Args:
        graph: The network.
        folder: Folder to write; its parent must exist.
        inputs: Golden inputs, (n, *graph.input_shape), of the type that the file takes.
        file: The exported file; None if there is none, for a runner of your own.
        store_codes: Whether to store the codes too, one byte each, and not only their digests: the
            replay then tells how many differ, and by how much.
        overwrite: Whether to replace an existing certificate.

    Returns:
        The folder.

    Raises:
        ExportError: If the folder exists or cannot be written, the file cannot be read or takes
            inputs of another type, or there are no inputs.
        WrongProductError: If a product is not the one that NumPy computes.
        ExecutionError: If the inputs do not fit the network.
    """
    check_graph(graph, "export_certificate", error=ExportError)
    if len(graph.inputs) > 1:
        raise ExportError(
            f"a certificate holds golden inputs of one array, and the network reads "
            f"{len(graph.inputs)}: {', '.join(map(str, graph.inputs))}."
        )
    folder, inputs = Path(folder), np.asarray(inputs)
    check_folder(folder, overwrite)
    if not inputs.size:
        raise ExportError("a certificate needs at least one golden input.")
    names = _onnx_names(file, inputs)
    executor = make_executor(graph)
    codes = {name: np.asarray(x) for name, x in executor.codes(inputs).items()}
    results = [np.asarray(x) for x in flat(graph.outputs, executor(inputs))]
    found = {output.name: x for output, x in zip(graph.outputs, results, strict=True)}
    _check_products(graph, codes, found)
    arrays: Arrays = {"input": inputs}
    tensors = _tensors(graph, codes, store_codes, arrays)
    outcomes = _outcomes(graph, results, arrays)
    certificate = {
        "format": FORMAT,
        "network": str(graph.metadata.get("name", "network")),
        "made_with": {
            "jaxqat": jaxqat.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "device": jax.devices()[0].device_kind,
        },
        "file": None if file is None else _file(Path(file), folder),
        "onnx": names,
        "input": {"name": "input", **_described(inputs, "input")},
        "tensors": tensors,
        "results": outcomes,
        "limits": LIMITS,
    }
    _write(folder, certificate, arrays)
    return folder


def _tensors(
    graph: IntegerGraph, codes: Arrays, store_codes: bool, arrays: Arrays
) -> list[dict[str, Any]]:
    """Describe what each node makes, in order; add the codes that are stored to the arrays."""
    found: list[dict[str, Any]] = []
    for number, node in enumerate(graph.nodes):
        name, key = node.output, None
        entry: dict[str, Any] = {"name": name, "layer": node.name}
        entry |= {"reads": [source for source in node.inputs if source != graph.input.name]}
        entry["by_island"] = name in graph.entries
        if name not in codes:  # Real numbers, and what an executor fuses: nothing to compare.
            found.append({**entry, "sha256": "", "array": None})
            continue
        if store_codes or name in graph.entries:
            key = f"codes{number}"
            arrays[key] = codes[name]
        found.append({**entry, **_described(codes[name], key)})
    return found


def _outcomes(
    graph: IntegerGraph, results: Sequence[np.ndarray[Any, Any]], arrays: Arrays
) -> list[dict[str, Any]]:
    """Describe each result, and add it to the arrays."""
    makers = {node.output: node for node in graph.nodes}
    found: list[dict[str, Any]] = []
    for number, (output, x) in enumerate(zip(graph.outputs, results, strict=True)):
        key, maker = f"result{number}", makers[output.name]
        arrays[key] = x
        entry: dict[str, Any] = {"name": "/".join(map(str, ("result", *output.path)))}
        entry |= {"path": list(output.path), "layer": maker.name, "reads": [output.name]}
        entry["by_island"] = isinstance(maker, FloatOp)
        found.append({**entry, **_described(x, key)})
    return found


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check the target of a certificate before any work is done.

    Raises:
        ExportError: If it exists or is a file, or its parent does not exist.
    """
    if not folder.parent.is_dir():
        raise ExportError(f"{folder}: the folder {folder.parent} does not exist.")
    if folder.is_file():
        raise ExportError(f"{folder}: is a file; give the name of a folder.")
    if folder.exists() and not overwrite:
        raise ExportError(
            f"{folder}: already exists; give another name or pass overwrite=True (--overwrite)."
        )


def _check_products(
    graph: IntegerGraph,
    codes: Arrays,
    results: Arrays,
) -> None:
    """Compare each product with NumPy, given the codes that it read.

    Raises:
        WrongProductError: If one differs; names it.
    """
    for node in graph.nodes:
        if not isinstance(node, Product | MatMul):
            continue
        actual = codes.get(node.output, results.get(node.output))
        exact = graph.requantization == "float" or node.output not in graph.tensors
        if not codes.keys() >= {*node.inputs} or actual is None or not exact:
            continue
        read = [codes[x].astype(np.int64) - graph.tensors[x].zero_point for x in node.inputs]
        expected = _by_numpy(graph, node, read)
        if not np.array_equal(expected, actual):
            count = int((expected != actual).sum())
            raise WrongProductError(
                f"node {node.name!r}: {count:,} of {expected.size:,} values of the compiled network"
                " are not those of NumPy, so nothing is certified: `jaxqat doctor` tests this "
                "version of jaxlib on this device."
            )


def _by_numpy(
    graph: IntegerGraph, node: Product | MatMul, units: list[np.ndarray[Any, Any]]
) -> Any:
    total = sums(node, *units) if isinstance(node, Product) else sums_of_pairs(node, *units)
    out = graph.tensors.get(node.output)
    return numpy_real(node, total) if out is None else numpy_codes(node, total, out)


def _described(array: np.ndarray[Any, Any], key: str | None) -> dict[str, Any]:
    """Return shape, type and digest of an array, and its name in golden.npz."""
    shape, dtype = list(array.shape), array.dtype.name
    return {"shape": shape, "dtype": dtype, "sha256": sha256(array), "array": key}


def _file(path: Path, folder: Path) -> dict[str, str] | None:
    if path.is_dir():
        return {"path": os.path.relpath(path, folder), "sha256": ""}
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return {"path": os.path.relpath(path, folder), "sha256": digest}


def _onnx_names(
    file: str | os.PathLike[str] | None, inputs: np.ndarray[Any, Any]
) -> dict[str, Any] | None:
    """Return where the codes of each tensor are in an ONNX file; None for another file."""
    if file is None or Path(file).suffix != ".onnx":
        return None
    model = load_onnx(file)
    (entry,) = model.graph.input
    numpy_dtype = library("onnx").helper.tensor_dtype_to_np_dtype
    taken = numpy_dtype(entry.type.tensor_type.elem_type)
    if taken != inputs.dtype:
        raise ExportError(f"{file}: takes {taken} inputs; the golden ones are {inputs.dtype}.")
    described = {entry.key: entry.value for entry in model.metadata_props}
    return json.loads(described["codes"])


def _write(folder: Path, certificate: dict[str, Any], arrays: Arrays) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # pyright: ignore[reportArgumentType]
    program = (resources.files("jaxqat.export") / "_replay.py").read_bytes()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be made: {error.strerror or error}.") from error
    write_atomically(folder / "golden.npz", content.getvalue(), error=ExportError)
    write_atomically(folder / "replay.py", program, error=ExportError)
    text = json.dumps(certificate, indent=1) + "\n"
    write_atomically(folder / "certificate.json", text, error=ExportError)
