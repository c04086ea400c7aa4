# pyright: strict
"""The integer network as plain data: int8 tensors and the operations on them.

Each tensor between two operations is int8 on its own grid, real = scale * (code - zero_point).
Requantization follows Jacob et al. 2018 (arXiv:1712.05877, section 2.2). Batch norm is folded into
the weights' scale and an int32 bias, which is added before the only multiplication:

    code = clip(round((acc + bias) * multiplier) + zero_point, low, high)

acc + bias is an int32 sum and is converted to float32 once. low and high are the smallest and the
largest code of the output; a ReLU only raises `low`. With `fixed_point` the multiplication and the
rounding are integer too (`_execute/arithmetic.py`). Arrays are NumPy arrays; this module computes
nothing and does not need JAX.

Each node kind has a file in `jaxqat.integer._nodes` with its fields, invariants and output shape.
Execution and export are subclasses of `GraphVisitor`, which has one method per node kind.
"""

import dataclasses
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, Literal, cast

import numpy as np

from jaxqat.errors import GraphError
from jaxqat.integer._inputs import INPUT, Input, InputType, check_inputs
from jaxqat.integer._islands import Island, find_islands
from jaxqat.integer._nodes.add import Add
from jaxqat.integer._nodes.affine import Affine
from jaxqat.integer._nodes.base import CODE_MAX, CODE_MIN, Node, Tensor, check_shape
from jaxqat.integer._nodes.concat import Concat
from jaxqat.integer._nodes.float_op import FloatOp
from jaxqat.integer._nodes.mat_mul import MatMul
from jaxqat.integer._nodes.max_pool import MaxPool
from jaxqat.integer._nodes.move import Move
from jaxqat.integer._nodes.multiply import Multiply
from jaxqat.integer._nodes.product import Product
from jaxqat.integer._nodes.quantize import Quantize
from jaxqat.integer._nodes.requantize import Requantize
from jaxqat.integer._nodes.sum_pool import SumPool
from jaxqat.integer._nodes.table import Table
from jaxqat.integer._packing import packed_size
from jaxqat.integer._results import Output, check_places

__all__ = [
    "CODE_MAX",
    "CODE_MIN",
    "INPUT",
    "NODE_KINDS",
    "Add",
    "Affine",
    "Concat",
    "FloatOp",
    "Input",
    "InputType",
    "IntegerGraph",
    "Island",
    "MatMul",
    "MaxPool",
    "Move",
    "Multiply",
    "Node",
    "Output",
    "Product",
    "Quantize",
    "Requantization",
    "Requantize",
    "SumPool",
    "Table",
    "Tensor",
]

Requantization = Literal["float", "fixed_point"]

NODE_KINDS: tuple[type[Node], ...] = (
    *(Quantize, Product, MatMul, Add, Multiply, Affine, Requantize, Table),
    *(MaxPool, SumPool, Move, Concat, FloatOp),
)
"""Every kind of node that a graph can have."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class IntegerGraph:
    """An integer network.

    What has no integer form is computed by `FloatOp` nodes, on real tensors: results of `FloatOp`,
    `Product`, `MatMul` and `SumPool` nodes that are not in `tensors`. Only `FloatOp` and `Quantize`
    nodes read real tensors.

    The constructor checks these invariants: each node reads only tensors of earlier nodes; each
    tensor is the output of exactly one node and has its output shape; moves and max pools keep
    zero point and bounds; arrays have the declared dtypes and shapes; sizes, strides and windows
    are positive; labels are as many as classes; codes fit int8; scales and multipliers are positive
    and finite; no accumulator can overflow int32.

    Attributes:
        inputs: The arrays that the network reads; only `Quantize` and `FloatOp` nodes do.
        tensors: Tensors by name.
        nodes: Nodes in order of execution.
        outputs: The arrays of the network's result, each a tensor of `tensors`, whose real values
            are returned, or otherwise a real tensor.
        requantization: 'float' (one float32 multiplication and a rounding) or 'fixed_point'
            (int32 multiplier and rounding shift).
        metadata: Free-form description, such as 'labels' (class names) and the origin.

    Raises:
        GraphError: If an invariant is broken; names the node or tensor.
    """

    inputs: tuple[Input, ...]
    tensors: dict[str, Tensor]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    requantization: Requantization = "float"
    metadata: dict[str, object] = dataclasses.field(default_factory=dict[str, object])

    def __post_init__(self):
        real: dict[str, tuple[int, ...]] = {each.name: each.shape for each in self.inputs}
        available = set(real)
        for tensor in self.tensors.values():
            tensor.check()
        self._check_inputs()
        self._check_outputs()
        # Only these nodes read real tensors.
        real_readers = (node for node in self.nodes if isinstance(node, Quantize | FloatOp))
        read = {name for node in real_readers for name in node.inputs}
        for node in self.nodes:
            self._check_order(node, available, read)
            inputs = [self.tensors[name] for name in node.inputs if name in self.tensors]
            node.check(inputs, self.tensors.get(node.output))
            self._check_shape(node, real)
            available.add(node.output)
        results = [output.name for output in self.outputs]
        missing = [name for name in (*self.tensors, *results) if name not in available]
        if missing:
            raise GraphError(f"no node makes {missing[0]!r}.")
        unread = [each for each in self.inputs if each.name not in read]
        if unread:
            raise GraphError(f"no Quantize or FloatOp node reads the input {unread[0]}.")
        self._check_labels()

    def __repr__(self) -> str:
        islands = f", {count} float islands" if (count := len(self.islands)) else ""
        shapes = ", ".join(f"{o} {o.shape}".strip() for o in self.outputs)
        taken = ", ".join(str(each.shape) for each in self.inputs)
        return (
            f"IntegerGraph({taken} -> {shapes}, {len(self.nodes)} nodes, "
            f"{self.size_bytes():,} bytes of weights{islands})"
        )

    @property
    def input(self) -> Input:
        """The only array that the network reads.

        Raises:
            GraphError: If there are several.
        """
        if len(self.inputs) != 1:
            names = ", ".join(map(str, self.inputs))
            raise GraphError(f"the network reads {len(self.inputs)} arrays ({names}), not one.")
        return self.inputs[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the only array that the network reads, without the batch."""
        return self.input.shape

    @property
    def input_type(self) -> InputType:
        """Type of the only array that the network reads."""
        return self.input.type

    @property
    def quantize(self) -> Quantize:
        """The first node that quantizes an input.

        Raises:
            GraphError: If there is none: float operations read the input.
        """
        for node in self.nodes:
            if self.quantizes_input(node):
                return cast("Quantize", node)
        raise GraphError("no Quantize node reads the input: float operations do.")

    @property
    def output(self) -> Output:
        """The only array of the result.

        Raises:
            GraphError: If there are several.
        """
        if len(self.outputs) != 1:
            names = ", ".join(map(str, self.outputs))
            raise GraphError(f"the network returns {len(self.outputs)} arrays ({names}), not one.")
        return self.outputs[0]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the only array of the result, without the batch."""
        return self.output.shape

    @property
    def takes_uint8(self) -> bool:
        """Whether the input may be uint8 images, for which a node has a table."""
        return any(isinstance(node, Quantize) and node.table is not None for node in self.nodes)

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the tensors that are quantized from real ones: of float islands' results."""
        quantized = (node for node in self.nodes if isinstance(node, Quantize))
        return tuple(node.output for node in quantized if not self.quantizes_input(node))

    @property
    def islands(self) -> tuple[Island, ...]:
        """The parts that are computed in float: connected operations without an integer form."""
        return find_islands(self.nodes, [output.name for output in self.outputs])

    @property
    def float_ops(self) -> tuple[FloatOp, ...]:
        """The operations without an integer form, in order."""
        return tuple(node for node in self.nodes if isinstance(node, FloatOp))

    def products(self) -> Iterator[Product]:
        """Yield convolutions and dense layers, in order."""
        return (node for node in self.nodes if isinstance(node, Product))

    def quantizes_input(self, node: Node) -> bool:
        """Return whether a node quantizes an input, and not a float island's result."""
        return isinstance(node, Quantize) and any(i.name in node.inputs for i in self.inputs)

    def _is_quantized(self, name: str) -> bool:
        return any(isinstance(node, Quantize) for node in self.readers(name))

    def readers(self, tensor: str) -> list[Node]:
        """Return the nodes that read the tensor of this name."""
        return [node for node in self.nodes if tensor in node.inputs]

    def is_output(self, tensor: str) -> bool:
        """Return whether the network returns the tensor of this name."""
        return any(output.name == tensor for output in self.outputs)

    def size_bytes(self) -> int:
        """Return the bytes of weights, packed, biases, multipliers, tables and float constants.

        Equal arrays count once, as they are stored: a layer of a loop has its weights in each
        iteration.
        """
        sizes: dict[tuple[str, tuple[int, ...], bytes], int] = {}

        def add(array: np.ndarray[Any, Any], size: int) -> None:
            sizes[array.dtype.str, array.shape, sha256(array.tobytes()).digest()] = size

        for node in self.float_ops:
            for constant in node.constants:
                if constant is not None:
                    add(constant, constant.nbytes)
        for node in self.nodes:
            for array in _constants(node):
                add(array, array.nbytes)
        for product in self.products():
            add(product.weights, packed_size(product.weights.size, product.weight_bits))
            add(product.bias, product.bias.nbytes)
            add(product.multiplier, product.multiplier.nbytes)
        return sum(sizes.values())

    def _check_inputs(self) -> None:
        for each in self.inputs:
            check_shape(f"inputs: {each}", each.shape)
        try:
            check_inputs(self.inputs)
        except ValueError as error:
            raise GraphError(f"inputs: {error}.") from error

    def _check_outputs(self) -> None:
        for output in self.outputs:
            check_shape(f"outputs: {output.name}", output.shape)
        try:
            check_places([output.path for output in self.outputs])
        except ValueError as error:
            raise GraphError(f"outputs: {error}.") from error

    def _check_labels(self) -> None:
        labels = self.metadata.get("labels")
        if not isinstance(labels, list | tuple):
            return
        count = len(cast("list[object]", labels))
        if not any(output.shape[-1:] == (count,) for output in self.outputs):
            shapes = ", ".join(str(output.shape) for output in self.outputs)
            raise GraphError(
                f"metadata.labels names {count} classes, and the network's results have the shapes "
                f"{shapes}."
            )

    def _check_order(self, node: Node, available: set[str], read: set[str]) -> None:
        missing = [name for name in node.inputs if name not in available]
        if not isinstance(node, Quantize | FloatOp):  # These alone read real tensors.
            missing += [name for name in node.inputs if name not in self.tensors]
        if missing:
            raise node.error(f"reads {missing[0]!r}, which no node before it makes.")
        if node.output in available:
            raise node.error(f"makes {node.output!r}, which an earlier node makes already.")
        real = node.may_be_real and (self.is_output(node.output) or node.output in read)
        if node.output not in self.tensors and not real:
            raise node.error(f"makes {node.output!r}, which is not a tensor of the graph.")

    def _check_shape(self, node: Node, real: dict[str, tuple[int, ...]]) -> None:
        """Check the shape that a node makes; note that of a real tensor in `real`."""
        if isinstance(node, FloatOp):
            if not self.is_output(node.output) and not self._is_quantized(node.output):
                return  # Its batch may be anywhere.
            shapes = list[tuple[int, ...]]()
        elif isinstance(node, Quantize):
            shapes = [real.get(name, ()) for name in node.inputs]
        else:
            shapes = [self.tensors[name].shape for name in node.inputs]
        shape = node.output_shape(shapes)
        if node.output not in self.tensors:
            real[node.output] = shape
        declared: list[tuple[int, ...]] = []
        if node.output in self.tensors:
            declared.append(self.tensors[node.output].shape)
        declared += [output.shape for output in self.outputs if output.name == node.output]
        for other in declared:
            if other != shape:
                raise node.error(
                    f"makes {node.output!r} of shape {shape}, which is declared as {other}."
                )


def _constants(node: Node) -> list[np.ndarray[Any, Any]]:
    """Return the arrays of a node that is no product and no island."""
    match node:
        case Table():
            return [node.table]
        case Affine():
            return [node.weights, node.bias, node.multiplier]
        case Quantize():
            return list(node.coefficients.values())
        case _:
            return []
