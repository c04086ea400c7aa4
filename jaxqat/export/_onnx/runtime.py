"""Execution of an exported ONNX file in ONNX Runtime: results, and codes of all tensors."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxqat.errors import ExportError
from jaxqat.export._onnx.builder import DIGEST, channels_first, channels_last, digest, library
from jaxqat.integer._inputs import Input, arrays_of, check_batch, check_inputs
from jaxqat.integer._results import Output, check_places, nested
from jaxqat.integer._store.files import read_regular

MAX_BYTES = 2**31  # Of a protobuf message.
MAX_OFFSET = 255  # Between the numbers of a file and int8 codes.

# From a batch, codes of the entries of a file by segment, and arguments by keyword, to the result
# and codes.
Runner = Callable[..., tuple[Any, dict[str, np.ndarray]]]


def load_onnx(source: str | os.PathLike | bytes) -> Any:
    """Load the `onnx.ModelProto` from a file that this library wrote.

    Args:
        source: Path or content of the file.

    Raises:
        ExportError: If the file cannot be read, is damaged, or was not written by this library.
        MissingPackageError: If the package `onnx` is not installed.
    """
    onnx = library("onnx")
    name = "the ONNX model" if isinstance(source, bytes) else str(source)
    try:
        is_bytes = isinstance(source, bytes)
        content = source if is_bytes else read_regular(Path(source), limit=MAX_BYTES)
    except OSError as error:
        raise ExportError(f"{name}: cannot be read: {error.strerror or error}.") from error
    try:
        model = onnx.load_model_from_string(content)
        _check_self_contained(model, name)
        onnx.checker.check_model(model)
    except ExportError:
        raise
    except Exception as error:  # The checker's, and protobuf's, whose class depends on the version.
        raise ExportError(f"{name}: is not a complete ONNX file: {error}") from error
    if _described(model, DIGEST) != digest(model):
        raise ExportError(f"{name}: is damaged: its content does not match its checksum.")
    _check_metadata(model, name)
    return model


def _check_self_contained(model: Any, name: str) -> None:
    """Refuse data in other files, which a runtime would read, and functions and training.

    Raises:
        ExportError: Names the tensor.
    """
    if model.functions or model.training_info:
        raise ExportError(f"{name}: holds functions or training, which jaxqat does not write.")
    for tensor in _tensors(model.graph):
        if tensor.data_location or tensor.external_data:
            raise ExportError(f"{name}: the tensor {tensor.name!r} is in another file.")


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield every stored tensor of a graph and of the graphs in its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (a for node in graph.node for a in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _check_metadata(model: Any, name: str) -> None:
    """Check the metadata that say where the codes of each tensor and the results are.

    Raises:
        ExportError: If they are not in the form that `export_onnx` writes.
    """
    try:
        for entry in json.loads(_described(model, "codes")).values():
            parts = entry["output"], entry["offset"], entry.get("entry", "")
            if [type(part) for part in parts] != [str, int, str] or abs(parts[1]) > MAX_OFFSET:
                raise TypeError(f"an entry is {entry}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{name}: its metadata 'codes' is invalid: {error}.") from error
    try:
        inputs = _inputs(model)
        check_inputs(inputs)
        if not 0 < len(inputs) <= len(model.graph.input):
            raise ValueError(f"{len(inputs)} places of {len(model.graph.input)} inputs")
    except (ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{name}: its metadata 'inputs' is invalid: {error}.") from error
    try:
        places = json.loads(_described(model, "outputs"))
        check_places([tuple(path) for path in places])
        if len(places) > len(model.graph.output):
            raise ValueError(f"{len(places)} places of {len(model.graph.output)} results")
    except (ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{name}: its metadata 'outputs' is invalid: {error}.") from error


def with_codes(model: Any) -> Any:
    """Return a copy of an exported model that also outputs the uint8 codes of all tensors.

    The codes are outputs of QuantizeLinear, so runtimes fuse the copy like the model itself.
    """
    onnx = library("onnx")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {output.name for output in copy.graph.output}
    for entry in json.loads(_described(model, "codes")).values():
        if entry["output"] not in present:
            present.add(entry["output"])
            copy.graph.output.append(
                onnx.helper.make_tensor_value_info(entry["output"], onnx.TensorProto.UINT8, None)
            )
    return copy


def make_session(model: Any, *, threads: int | None = None, exact: bool = True) -> Any:
    """Return an ONNX Runtime session on the CPU.

    Args:
        model: An `onnx.ModelProto`.
        threads: Threads per operation; None leaves it to ONNX Runtime.
        exact: Whether to ask for exact but slower products unless the processor is known to have
            VNNI; without it, products can saturate on x86.
    """
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # Errors only.
    if threads is not None:
        options.intra_op_num_threads = threads
    if exact and not _has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _has_vnni() -> bool:
    """Return whether Linux reports VNNI, which adds products of uint8 and int8 in 32 bits."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def make_runner(source: str | os.PathLike | bytes, *, expose: bool = False) -> Runner:
    """Return a function that runs an exported file in ONNX Runtime, one batch per call.

    Args:
        source: Path or content of the file.
        expose: Whether to return the codes of all tensors too.

    Returns:
        A function from images (n, *input_shape) of the type that the file declares, or a tuple of
        the model's arguments, and int8 codes by tensor if it was written by segment, to the result,
        as the integer network returns it, and the codes by name of the graph's tensor, int8 in
        JAX's layout (empty without `expose`). It raises `ExportError` for other inputs.

    Raises:
        ExportError: If the file cannot be read.
        MissingPackageError: If `onnx` or `onnxruntime` is not installed.
    """
    model = load_onnx(source)
    session = make_session(with_codes(model) if expose else model)
    inputs = _inputs(model)
    declared = session.get_inputs()[: len(inputs)]
    given_codes = session.get_inputs()[len(inputs) :]
    described = json.loads(_described(model, "codes")) if expose or given_codes else {}
    entries = described if expose else {}
    places = json.loads(_described(model, "outputs"))
    results = [output.name for output in model.graph.output[: len(places)]]
    outputs = [
        Output(name=name, shape=(), path=tuple(path))
        for name, path in zip(results, places, strict=True)
    ]
    names = [*results, *{entry["output"] for entry in entries.values()}]

    def run(
        batch: Any, given: Mapping[str, Any] | None = None, **keywords: Any
    ) -> tuple[Any, dict[str, np.ndarray]]:
        try:
            arguments = batch if isinstance(batch, tuple) else (batch,)
            arrays = arrays_of(inputs, arguments, keywords)
        except ValueError as error:
            raise ExportError(f"{error}.") from error
        feed: dict[str, np.ndarray] = {}
        for each, entry, array in zip(inputs, declared, arrays, strict=True):
            feed[entry.name] = _checked(np.asarray(array), entry, each, len(inputs))
        try:
            check_batch(inputs, list(feed.values()))
        except ValueError as error:
            raise ExportError(f"{error}.") from error
        for name, entry in described.items():
            if "entry" in entry:
                feed[entry["entry"]] = _as_numbers(np.asarray((given or {})[name]), entry["offset"])
        values = dict(zip(names, session.run(names, feed), strict=True))
        codes = {
            tensor: _as_codes(values[entry["output"]], entry["offset"])
            for tensor, entry in entries.items()
        }
        return nested(outputs, [values[name] for name in results]), codes

    return run


def run_onnx(
    source: str | os.PathLike | bytes,
    images: Any,
    *,
    batch_size: int = 256,
    expose: bool = False,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Run an exported file in ONNX Runtime on many images, and return as `make_runner`'s function.

    With `expose`, the codes of all images are in memory at once: about 0.9 MB per image for a
    ResNet-18 at 32 x 32.

    Args:
        source: Path or content of the file.
        images: (n, *input_shape), with n of at least 1; or a tuple of the model's arguments.
        batch_size: Images per batch.
        expose: Whether to return the codes of all tensors too.
    """
    run = make_runner(source, expose=expose)
    count = next((len(x) for x in jax.tree.leaves(images) if np.ndim(x)), 0)
    starts = range(0, max(count, 1), batch_size)

    def part(start: int) -> Any:
        return jax.tree.map(lambda x: x[start : start + batch_size] if np.ndim(x) else x, images)

    results, codes = zip(*(run(part(i)) for i in starts), strict=True)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results), {
        name: np.concatenate([batch[name] for batch in codes]) for name in codes[0]
    }


def _as_codes(numbers: np.ndarray, offset: int) -> np.ndarray:
    """Convert ONNX's uint8 codes, channels first, to the graph's int8 codes, channels last."""
    codes = (numbers.astype(np.int16) - offset).astype(np.int8)
    return codes.transpose(channels_last(codes.ndim))


def _as_numbers(codes: np.ndarray, offset: int) -> np.ndarray:
    """Convert the graph's int8 codes to ONNX's uint8 codes, channels first."""
    numbers = (codes.astype(np.int16) + offset).astype(np.uint8)
    return numbers.transpose(channels_first(codes.ndim))


def _checked(array: np.ndarray, declared: Any, each: Input, count: int) -> np.ndarray:
    """Return the array of an input after a check of its type and shape."""
    dtype = {"float": "float32"}.get(name := declared.type[len("tensor(") : -1], name)
    shape = tuple(declared.shape[1:])
    if dtype == "int32" and np.issubdtype(array.dtype, np.integer):  # NumPy's are int64.
        same = np.array_equal(array, numbers := array.astype(np.int32))
        array = numbers if same else array
    if array.dtype.name != dtype or array.shape[1:] != shape or not len(array):
        raise ExportError(
            f"{'images' if count == 1 else f'input {each}'} must be {dtype} of the shape (n, "
            f"{', '.join(map(str, shape))}), with n of at least 1, got {array.dtype.name} "
            f"{array.shape}."
        )
    return array


def _inputs(model: Any) -> list[Input]:
    """Return the inputs of a file; their shapes and types are those that it declares.

    A file of an earlier version has one, and does not describe it.
    """
    if not any(entry.key == "inputs" for entry in model.metadata_props):
        return [Input(shape=())]
    return [Input(shape=(), path=tuple(path)) for path in json.loads(_described(model, "inputs"))]


def _described(model: Any, key: str) -> str:
    """Return an entry of the file's metadata."""
    for entry in model.metadata_props:
        if entry.key == key:
            return entry.value
    raise ExportError(f"The ONNX file has no metadata {key!r}: jaxqat did not write it.")
