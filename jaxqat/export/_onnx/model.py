# pyright: strict, reportUnknownMemberType=false
"""The integer network as an ONNX file that ONNX Runtime and OpenVINO run on integer kernels.

The file's input is a batch of images in JAX's layout, (batch, *spatial, channels): float32 as the
training graph takes them, or uint8 as they are on disk, with normalization inside. Its result is
float32. The batch is of any size. Between them all tensors are uint8 and all weights int8, in
QuantizeLinear/DequantizeLinear form (`nodes`).

On x86 processors without VNNI, ONNX Runtime's product of uint8 and int8 adds pairs of products in
16 bits, which saturates where codes and weights are large. Its session option
`session.x64quantprecision` = 1 asks for exact sums there (`run_onnx` sets it); codes of the recipe
`int8_symmetric`, 0..127 behind a ReLU, cannot saturate.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxqat.errors import ExportError
from jaxqat.export._files import check_target
from jaxqat.export._onnx.builder import OPSET, library
from jaxqat.export._onnx.nodes import OnnxWriter
from jaxqat.integer._store.files import write_atomically
from jaxqat.integer.graph import IntegerGraph

Input = Literal["float", "uint8"]

INPUT, OUTPUT = "images", "logits"


def onnx_model(graph: IntegerGraph, *, input: Input = "float", opset: int = OPSET) -> Any:
    """Return an integer network as an `onnx.ModelProto`.

    Args:
        graph: The network, with requantization 'float'.
        input: 'float': the network's own input. 'uint8': images of 0..255, for a network with a
            table of pixel codes.
        opset: Version of ONNX's operators, 13 or later.

    Raises:
        ExportError: If ONNX has no exact form of the network; names the node.
        ImportError: If the package `onnx` is not installed.
    """
    if input not in ("float", "uint8"):
        raise ExportError(f"input must be 'float' or 'uint8', got {input!r}.")
    if graph.requantization != "float":
        raise ExportError(
            f"The network's requantization is {graph.requantization!r}, a rounding shift of 64-bit "
            "products, for which ONNX has no operation; right would be to convert with "
            "requantization='float'."
        )
    writer = OnnxWriter(graph, INPUT, OUTPUT, uint8=input == "uint8")
    writer.write()
    return writer.builder.model(
        [(INPUT, np.uint8 if input == "uint8" else np.float32, graph.input_shape)],
        [(OUTPUT, np.float32, graph.output_shape)],
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
    """Write an integer network as an ONNX file, whole or not at all.

    Args:
        graph: The network, with requantization 'float'.
        path: File to write; its folder exists.
        input: What the file takes: see `onnx_model`.
        overwrite: Whether a file of that name may be replaced.

    Returns:
        The path.

    Raises:
        ExportError: If the network has no exact ONNX form, the file exists already, or it cannot
            be written.
        ImportError: If the package `onnx` is not installed.
    """
    path = Path(path)
    check_target(path, overwrite)
    model = onnx_model(graph, input=input)
    library("onnx.checker").check_model(model, full_check=True)
    write_atomically(path, model.SerializeToString(), error=ExportError)
    return path


def _properties(graph: IntegerGraph, input: Input, writer: OnnxWriter) -> dict[str, str]:
    """What the file says about itself, as text: JSON, apart from single words."""
    described = {
        "layout": ["batch", *(f"space{i}" for i in range(len(graph.input_shape) - 1)), "channel"],
        "values": "0..255, normalized inside" if input == "uint8" else "normalized as in training",
    }
    codes = {
        name: {"output": writer.codes[name], "offset": writer.offsets[name]}
        for name in graph.tensors
    }
    metadata = {key: value for key, value in graph.metadata.items() if key != "labels"}
    labels = graph.metadata.get("labels")
    return {
        **({} if labels is None else {"labels": json.dumps(labels, default=str)}),
        "metadata": json.dumps(metadata, default=str),
        "input": json.dumps(described),
        "codes": json.dumps(codes),
    }
