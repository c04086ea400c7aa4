"""An ONNX graph under construction: nodes, named constants, and the layout of tensors.

JAX counts channels last, ONNX first: a tensor with spatial axes, (batch, *spatial, channels),
becomes (batch, channels, *spatial); one of (batch, channels) is the same in both.
"""

import hashlib
import importlib
from types import ModuleType
from typing import Any

import numpy as np

import jaxqat
from jaxqat.errors import ExportError

# Current releases of ONNX Runtime and OpenVINO run all of it; the oldest has what is written here.
OPSET, OLDEST_OPSET = 17, 13


def library(name: str) -> ModuleType:
    """An optional package, or an error that says how to get it.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"The package {name!r} is not installed; ONNX export and checks need "
            f"`pip install 'jaxqat[{'onnx,openvino' if name == 'openvino' else 'onnx'}]'`."
        ) from error


def channels_first(rank: int) -> list[int]:
    """Source axis of each axis, from JAX's layout to ONNX's; rank counts the batch."""
    return [0, *([rank - 1] if rank > 1 else []), *range(1, rank - 1)]


def channels_last(rank: int) -> list[int]:
    """Source axis of each axis, from ONNX's layout to JAX's."""
    return [0, *range(2, rank), *([1] if rank > 1 else [])]


class Builder:
    """Nodes and constants of an ONNX graph, each under a name of its own."""

    def __init__(self):
        self._onnx = library("onnx")
        self.nodes: list[Any] = []
        self._names: set[str] = set()
        self._numbers: dict[tuple | None, str] = {}
        self._arrays: list[Any] = []

    def name(self, wanted: str) -> str:
        """A name that nothing has yet: the wanted one, or that with a number."""
        name, number = wanted, 1
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name

    def constant(self, values, name: str) -> str:
        """An initializer. Equal numbers share one; arrays do not.

        ONNX Runtime, asked for exact products, rewrites int8 weights as uint8, and fails on
        weights that two nodes share.
        """
        array = np.ascontiguousarray(values).reshape(np.shape(values))
        key = (array.dtype.str, array.tobytes()) if array.ndim == 0 else None
        if key in self._numbers:
            return self._numbers[key]
        name = self.name(name)
        self._arrays.append(self._onnx.numpy_helper.from_array(array, name))
        if key is not None:
            self._numbers[key] = name
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes) -> str:
        """A node; returns the name of its output, `output` or that with a number."""
        output = self.name(output)
        node = self._onnx.helper.make_node(kind, inputs, [output], f"{kind}:{output}", **attributes)
        self.nodes.append(node)
        return output

    def transpose(self, x: str, axes: list[int], output: str) -> str:
        """The tensor with its axes in another order; itself if the order is the same."""
        if axes == list(range(len(axes))):
            return x
        return self.add("Transpose", [x], output, perm=axes)

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name, wherever it stands."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    def model(self, inputs: list[Any], outputs: list[Any], *, opset: int, properties: dict):
        """The finished model.

        Args:
            inputs: Name, NumPy type and shape without the batch, of each input.
            outputs: The same of each output.
            opset: Version of ONNX's operators.
            properties: Metadata, text by name.
        """
        helper = self._onnx.helper
        newest = self._onnx.defs.onnx_opset_version()
        if not OLDEST_OPSET <= opset <= newest:
            raise ExportError(f"opset must be in {OLDEST_OPSET}..{newest}, got {opset!r}.")
        opsets = [helper.make_opsetid("", opset)]

        def declared(values):
            for name, dtype, shape in values:
                element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
                yield helper.make_tensor_value_info(name, element, ["batch", *shape])

        graph = helper.make_graph(
            self.nodes, "jaxqat", [*declared(inputs)], [*declared(outputs)], self._arrays
        )
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="jaxqat",
            producer_version=jaxqat.__version__,
        )
        helper.set_model_props(model, {**properties, "sha256": digest(graph)})
        return model


def digest(graph: Any) -> str:
    """SHA-256 of an ONNX graph, weights included."""
    return hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()
