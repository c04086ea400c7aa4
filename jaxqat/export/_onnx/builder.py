"""Building an ONNX graph: nodes, named constants and tensor layouts.

JAX's layout is channels last, ONNX's is channels first: a tensor (batch, *spatial, channels)
becomes (batch, channels, *spatial); (batch, channels) is the same in both.
"""

import hashlib
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

import jaxqat
from jaxqat.errors import ExportError, MissingPackageError
from jaxqat.integer._inputs import FIRST, Input
from jaxqat.integer.graph import Output

# Current ONNX Runtime and OpenVINO support opset 17; 13 is the oldest with all operators used.
OPSET, OLDEST_OPSET = 17, 13
DIGEST = "sha256"  # Key of the digest in the metadata.


def library(name: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingPackageError: If it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"The package {name!r} is not installed; ONNX files need "
            f"`pip install 'jaxqat[{'onnx,openvino' if name == 'openvino' else 'onnx'}]'`."
        ) from error


def channels_first(rank: int) -> list[int]:
    """Return the source axis of each axis, from JAX's layout to ONNX's; rank counts the batch."""
    return [0, *([rank - 1] if rank > 1 else []), *range(1, rank - 1)]


def channels_last(rank: int) -> list[int]:
    """Return the source axis of each axis, from ONNX's layout to JAX's."""
    return [0, *range(2, rank), *([1] if rank > 1 else [])]


class Builder:
    """Build an ONNX graph of nodes and constants with unique names."""

    def __init__(self):
        self._onnx = library("onnx")
        self.nodes: list[Any] = []
        self._names: set[str] = set()
        self._numbers: dict[tuple | None, str] = {}
        self._arrays: list[Any] = []

    def name(self, base: str) -> str:
        """Return an unused name: `base`, or `base` with a number."""
        name, number = base, 1
        while name in self._names:
            number += 1
            name = f"{base}_{number}"
        self._names.add(name)
        return name

    def constant(self, values, name: str) -> str:
        """Add an initializer and return its name. Equal ones share it, but for arrays of codes.

        ONNX Runtime with exact products rewrites int8 weights as uint8, which fails for weights
        that two nodes share.
        """
        array = np.ascontiguousarray(values).reshape(np.shape(values))
        shared = array.ndim == 0 or array.dtype.itemsize > 1
        key = (array.dtype.str, array.shape, array.tobytes()) if shared else None
        if key in self._numbers:
            return self._numbers[key]
        name = self.name(name)
        self._arrays.append(self._onnx.numpy_helper.from_array(array, name))
        if key is not None:
            self._numbers[key] = name
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes) -> str:
        """Add a node and return the name of its output: `output`, or `output` with a number."""
        return self._append(kind, inputs, self.name(output), **attributes)

    def _append(self, kind: str, inputs: list[str], output: str, **attributes) -> str:
        node = self._onnx.helper.make_node(kind, inputs, [output], f"{kind}:{output}", **attributes)
        self.nodes.append(node)
        return output

    def transpose(self, x: str, axes: list[int], output: str) -> str:
        """Transpose a tensor; return it unchanged if the order of its axes is the same."""
        if axes == list(range(len(axes))):
            return x
        return self.add("Transpose", [x], output, perm=axes)

    def rename_all(self, old: list[str], new: list[str]) -> None:
        """Rename tensors in all nodes; one that has several new names is copied."""
        renamed: dict[str, str] = {}
        for before, after in zip(old, new, strict=True):
            if before in renamed or before not in self._made():
                self._append("Identity", [renamed.get(before, before)], after)
            else:
                renamed[before] = after
                self._rename(before, after)

    def _made(self) -> set[str]:
        """Return the names of all tensors that nodes make."""
        return {name for node in self.nodes for name in node.output}

    def _rename(self, old: str, new: str) -> None:
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    def model(self, inputs: list[Any], outputs: list[Any], *, opset: int, properties: dict):
        """Return the finished `onnx.ModelProto`.

        Args:
            inputs: Name, NumPy dtype and shape without the batch of each input.
            outputs: The same for each output.
            opset: Version of ONNX's operator set.
            properties: Metadata, strings by name.

        Raises:
            ExportError: If the opset is not supported.
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
        helper.set_model_props(model, properties)
        helper.set_model_props(model, {**properties, DIGEST: digest(model)})
        return model


def output_name(output: Output) -> str:
    """Return a name for a result: 'logits' for the only one, else from its place."""
    if not output.path:
        return "logits"
    first = () if isinstance(output.path[0], str) else ("output",)
    return "_".join(map(str, (*first, *output.path)))


def input_names(inputs: Sequence[Input]) -> list[str]:
    """Return a name for each input: 'images' for the only argument, else from its place."""
    if len(inputs) == 1 and inputs[0].path == FIRST:
        return ["images"]
    return ["_".join(map(str, ("input", *each.path))) for each in inputs]


def digest(model: Any) -> str:
    """Return the SHA-256 of an ONNX model: graph, weights, opset and all metadata but itself."""
    rest = type(model)()
    rest.CopyFrom(model)
    del rest.metadata_props[:]
    rest.metadata_props.extend(e for e in model.metadata_props if e.key != DIGEST)
    return hashlib.sha256(rest.SerializeToString(deterministic=True)).hexdigest()
