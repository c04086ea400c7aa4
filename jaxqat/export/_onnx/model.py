# pyright: strict, reportUnknownMemberType=false
"""Export of the integer network to ONNX, for the integer kernels of ONNX Runtime and OpenVINO.

The input is a batch of images in JAX's layout, (batch, *spatial, channels): float32 like the input
of the training graph, or raw uint8, which the file normalizes. The batch may have any size. The
result is float32. In between, tensors are uint8 and weights int8, in QuantizeLinear and
DequantizeLinear form (`nodes`).

On x86 processors without VNNI, ONNX Runtime adds pairs of uint8 x int8 products in 16 bits, which
saturates for large codes and weights. The session option `session.x64quantprecision` = 1 asks for
exact sums (`run_onnx` sets it). Codes of the recipe `int8_symmetric` after a ReLU are 0..127 and
cannot saturate.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxqat.errors import ExportError
from jaxqat.export._files import check_target
from jaxqat.export._onnx.builder import OPSET, channels_first, input_names, library
from jaxqat.export._onnx.nodes import OnnxWriter
from jaxqat.integer._guard import check_graph
from jaxqat.integer._store.files import write_atomically
from jaxqat.integer.graph import IntegerGraph

Input = Literal["float", "uint8"]


def onnx_model(
    graph: IntegerGraph,
    *,
    input: Input = "float",
    opset: int = OPSET,
    by_segment: bool = False,
) -> Any:
    """Return an integer network as an `onnx.ModelProto`.

    Args:
        graph: Network with requantization 'float'.
        input: 'float' for the model's own input, float32 or integers; 'uint8' for images of 0..255,
            if the network has a table of pixel codes.
        opset: Version of ONNX's operator set, 13 or later.
        by_segment: Whether the tensors that float islands make are further inputs, uint8 and
            channels first, so that each integer part is computed by itself.

    Raises:
        ExportError: If ONNX cannot represent the network exactly, or an argument is invalid.
        MissingPackageError: If the package `onnx` is not installed.
    """
    check_graph(graph, "export_onnx", error=ExportError)
    if input not in ("float", "uint8"):
        raise ExportError(f"input must be 'float' or 'uint8', got {input!r}.")
    if graph.requantization != "float":
        raise ExportError(
            f"The network's requantization is {graph.requantization!r}, a rounding shift of 64-bit "
            "products, for which ONNX has no operation; convert with requantization='float'."
        )
    uint8 = input == "uint8" and any(i.type != "uint8" for i in graph.inputs)  # With a table.
    names = input_names(graph.inputs)  # Perhaps not unique.
    writer = OnnxWriter(graph, names, uint8=uint8, opset=opset, by_segment=by_segment)
    writer.write()
    inputs = [
        (name, np.dtype(np.uint8 if uint8 else each.type), each.shape)
        for name, each in zip(writer.inputs, graph.inputs, strict=True)
    ]
    for name, entry in writer.entries.items():
        shape = graph.tensors[name].shape
        _, *order = channels_first(1 + len(shape))
        inputs.append((entry, np.dtype(np.uint8), tuple(shape[axis - 1] for axis in order)))
    return writer.builder.model(
        inputs,
        _results(graph, writer),
        opset=opset,
        properties=_properties(graph, input, writer),
    )


def export_onnx(
    graph: IntegerGraph,
    path: str | os.PathLike[str],
    *,
    input: Input = "float",
    overwrite: bool = False,
) -> Path:
    """Write an integer network as an ONNX file, atomically.

    Args:
        graph: Network with requantization 'float'.
        path: File to write; its folder must exist.
        input: Input of the file: 'float' for the network's float32 input; 'uint8' for images of
            0..255, if the network has a table of pixel codes.
        overwrite: Whether to replace an existing file.

    Returns:
        The path.

    Raises:
        ExportError: If ONNX cannot represent the network exactly, or the file already exists or
            cannot be written.
        MissingPackageError: If the package `onnx` is not installed.
    """
    path = Path(path)
    check_target(path, overwrite)
    model = onnx_model(graph, input=input)
    library("onnx.checker").check_model(model, full_check=True)
    write_atomically(path, model.SerializeToString(), error=ExportError)
    return path


def _results(graph: IntegerGraph, writer: OnnxWriter) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Return name, type and shape of each result."""
    made = {node.output: node.dtype for node in graph.float_ops}
    return [
        (name, np.dtype(made.get(output.name, "float32")), output.shape)
        for name, output in zip(writer.results, graph.outputs, strict=True)
    ]


def _properties(graph: IntegerGraph, input: Input, writer: OnnxWriter) -> dict[str, str]:
    """Return the file's metadata: JSON text by key."""
    rank = len(graph.inputs[0].shape)
    described = {
        "layout": ["batch", *(f"space{i}" for i in range(rank - 1)), "channel"],
        "values": "0..255, normalized inside" if input == "uint8" else "normalized as in training",
    }
    codes = {
        name: {
            "output": writer.codes[name],
            "offset": writer.offsets[name],
            **({"entry": writer.entries[name]} if name in writer.entries else {}),
        }
        for name in graph.tensors
    }
    metadata = {key: value for key, value in graph.metadata.items() if key != "labels"}
    labels = graph.metadata.get("labels")
    return {
        **({} if labels is None else {"labels": json.dumps(labels, default=str)}),
        "metadata": json.dumps(metadata, default=str),
        "input": json.dumps(described),
        "inputs": json.dumps([list(each.path) for each in graph.inputs]),
        "codes": json.dumps(codes),
        "islands": json.dumps([str(island) for island in graph.islands]),
        "outputs": json.dumps([list(output.path) for output in graph.outputs]),
    }
