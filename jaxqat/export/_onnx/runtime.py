"""An exported ONNX file in ONNX Runtime: its results, and the codes of every tensor."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxqat.errors import ExportError
from jaxqat.export._onnx.builder import channels_last, digest, library

Runner = Callable[[np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]


def load_onnx(source: str | os.PathLike | bytes) -> Any:
    """Load the `onnx.ModelProto` of a file that this library wrote.

    Args:
        source: Path, or the file's content.

    Raises:
        ExportError: If there is no such file, or it is not, or no longer, what was written.
        ImportError: If the package `onnx` is not installed.
    """
    onnx = library("onnx")
    name = "the ONNX model" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ExportError(f"{name}: cannot be read: {error.strerror or error}.") from error
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's own, which depends on its version, and the checker's.
        raise ExportError(f"{name}: is no whole ONNX file: {error}") from error
    if _described(model, "sha256") != digest(model.graph):
        raise ExportError(f"{name}: is not what was written: its checksum is another.")
    return model


def with_codes(model: Any) -> Any:
    """A copy of an exported model whose outputs are its result and the uint8 codes of all tensors.

    Runtimes fuse it as they fuse the model itself: the codes are what QuantizeLinear makes.
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
    """An ONNX Runtime session on the CPU.

    Args:
        model: An `onnx.ModelProto`.
        threads: Threads of one operation; None leaves it to ONNX Runtime.
        exact: Whether to ask for exact products where the processor's own might saturate, that is
            on an x86 processor that is not known to have VNNI. They are slower.
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
    """Whether the processor adds products of uint8 and int8 in 32 bits, as far as Linux tells."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def make_runner(source: str | os.PathLike | bytes, *, expose: bool = False) -> Runner:
    """A function that runs an exported file in ONNX Runtime, a batch a call.

    Args:
        source: Path, or the file's content.
        expose: Whether to give the codes of all tensors as well.

    Returns:
        A function from images (n, *input_shape), float32 or uint8 as the file takes them, to the
        results, float32 (n, *output_shape), and the codes by name of the graph's tensor, int8 in
        JAX's layout; without `expose` there are none. It raises `ExportError` for other images.

    Raises:
        ExportError: If the file cannot be read.
        ImportError: If `onnx` or `onnxruntime` is not installed.
    """
    model = load_onnx(source)
    session = make_session(with_codes(model) if expose else model)
    (declared,) = session.get_inputs()
    entries = json.loads(_described(model, "codes")) if expose else {}
    result = model.graph.output[0].name
    names = [result, *{entry["output"] for entry in entries.values()}]

    def run(images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        _check_images(images, declared)
        values = dict(zip(names, session.run(names, {declared.name: images}), strict=True))
        codes = {
            tensor: _as_codes(values[entry["output"]], entry["offset"])
            for tensor, entry in entries.items()
        }
        return values[result], codes

    return run


def run_onnx(
    source: str | os.PathLike | bytes,
    images: np.ndarray,
    *,
    batch_size: int = 256,
    expose: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run an exported file in ONNX Runtime on many images; see `make_runner`.

    With `expose`, the codes of all images are held at once: of a ResNet-18 at 32 x 32 some 0.9 MB
    an image.

    Args:
        source: Path, or the file's content.
        images: (n, *input_shape), with n of at least 1.
        batch_size: Images at a time.
        expose: Whether to give the codes of all tensors as well.
    """
    run = make_runner(source, expose=expose)
    starts = range(0, max(len(images), 1), batch_size)
    results, codes = zip(*(run(images[i : i + batch_size]) for i in starts), strict=True)
    return np.concatenate(results), {
        name: np.concatenate([batch[name] for batch in codes]) for name in codes[0]
    }


def _as_codes(numbers: np.ndarray, offset: int) -> np.ndarray:
    """The graph's int8 codes, channels last, of ONNX's uint8 numbers, channels first."""
    codes = (numbers.astype(np.int16) - offset).astype(np.int8)
    return codes.transpose(channels_last(codes.ndim))


def _check_images(images: np.ndarray, declared: Any) -> None:
    wanted = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}[declared.type]
    shape = tuple(declared.shape[1:])
    if images.dtype.name != wanted or images.shape[1:] != shape or not len(images):
        raise ExportError(
            f"images are {images.dtype.name} of shape {images.shape}; the file takes {wanted} of "
            f"shape (n, {', '.join(map(str, shape))}), with n of at least 1."
        )


def _described(model: Any, key: str) -> str:
    """An entry of the file's metadata."""
    for entry in model.metadata_props:
        if entry.key == key:
            return entry.value
    raise ExportError(f"The ONNX file has no metadata {key!r}: jaxqat did not write it.")
