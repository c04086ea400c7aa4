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
from typing import Literal

from jaxqat.errors import GraphError
from jaxqat.integer._nodes.add import Add
from jaxqat.integer._nodes.base import CODE_MAX, CODE_MIN, Node, Tensor
from jaxqat.integer._nodes.concat import Concat
from jaxqat.integer._nodes.max_pool import MaxPool
from jaxqat.integer._nodes.move import Move
from jaxqat.integer._nodes.product import Product
from jaxqat.integer._nodes.quantize import Quantize
from jaxqat.integer._nodes.requantize import Requantize
from jaxqat.integer._nodes.sum_pool import SumPool
from jaxqat.integer._packing import packed_size

__all__ = [
    "CODE_MAX",
    "CODE_MIN",
    "NODE_KINDS",
    "Add",
    "Concat",
    "IntegerGraph",
    "MaxPool",
    "Move",
    "Node",
    "Product",
    "Quantize",
    "Requantization",
    "Requantize",
    "SumPool",
    "Tensor",
]

Requantization = Literal["float", "fixed_point"]

NODE_KINDS: tuple[type[Node], ...] = (
    *(Quantize, Product, Add, Requantize),
    *(MaxPool, SumPool, Move, Concat),
)
"""Every kind of node that a graph can have."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class IntegerGraph:
    """An integer network.

    The constructor checks these invariants: each node reads only tensors of earlier nodes; each
    tensor is the output of exactly one node and has its output shape; moves and max pools keep
    zero point and bounds; arrays have the declared dtypes and shapes; codes fit int8; scales and
    multipliers are positive and finite; no accumulator can overflow int32.

    Attributes:
        input_shape: Shape of one input, without the batch. The input is float32, or also uint8 if
            the `Quantize` node has a table.
        tensors: Tensors by name.
        nodes: Nodes in order of execution.
        output: Name of the network's result: a tensor of `tensors`, whose real values are the
            result, or otherwise the real output of a product or an average pool.
        output_shape: Shape of one result, without the batch.
        requantization: 'float' (one float32 multiplication and a rounding) or 'fixed_point'
            (int32 multiplier and rounding shift).
        metadata: Free-form description, such as 'labels' (class names) and the origin.

    Raises:
        GraphError: If an invariant is broken; names the node or tensor.
    """

    input_shape: tuple[int, ...]
    tensors: dict[str, Tensor]
    nodes: tuple[Node, ...]
    output: str
    output_shape: tuple[int, ...]
    requantization: Requantization = "float"
    metadata: dict[str, object] = dataclasses.field(default_factory=dict[str, object])

    def __post_init__(self):
        available: set[str] = set()
        for tensor in self.tensors.values():
            tensor.check()
        for node in self.nodes:
            self._check_order(node, available)
            inputs = [self.tensors[name] for name in node.inputs]
            node.check(inputs, self.tensors.get(node.output))
            self._check_shape(node)
            available.add(node.output)
        missing = [name for name in (*self.tensors, self.output) if name not in available]
        if missing:
            raise GraphError(f"no node makes {missing[0]!r}.")
        if sum(isinstance(node, Quantize) for node in self.nodes) != 1:
            raise GraphError("a graph must have exactly one Quantize node.")

    def __repr__(self) -> str:
        return (
            f"IntegerGraph({self.input_shape} -> {self.output_shape}, {len(self.nodes)} nodes, "
            f"{self.size_bytes():,} bytes of weights)"
        )

    @property
    def quantize(self) -> Quantize:
        """The node that quantizes the input."""
        return next(node for node in self.nodes if isinstance(node, Quantize))

    def products(self) -> Iterator[Product]:
        """Yield convolutions and dense layers, in order."""
        return (node for node in self.nodes if isinstance(node, Product))

    def readers(self, tensor: str) -> list[Node]:
        """Return the nodes that read the tensor of this name."""
        return [node for node in self.nodes if tensor in node.inputs]

    def size_bytes(self) -> int:
        """Return the bytes of the packed weights, int32 biases and float32 multipliers."""
        return sum(
            packed_size(p.weights.size, p.weight_bits) + p.bias.nbytes + p.multiplier.nbytes
            for p in self.products()
        )

    def _check_order(self, node: Node, available: set[str]) -> None:
        missing = [name for name in node.inputs if name not in available]
        # A real result is not in `tensors`, so no node can read it.
        missing += [name for name in node.inputs if name not in self.tensors]
        if missing:
            raise node.error(f"reads {missing[0]!r}, which no node before it makes.")
        if node.output in available:
            raise node.error(f"makes {node.output!r}, which an earlier node makes already.")
        real = node.may_be_real and node.output == self.output
        if node.output not in self.tensors and not real:
            raise node.error(f"makes {node.output!r}, which is not a tensor of the graph.")

    def _check_shape(self, node: Node) -> None:
        if isinstance(node, Quantize):
            shapes = [self.input_shape]
        else:
            shapes = [self.tensors[name].shape for name in node.inputs]
        shape = node.output_shape(shapes)
        declared: list[tuple[int, ...]] = []
        if node.output in self.tensors:
            declared.append(self.tensors[node.output].shape)
        if node.output == self.output:
            declared.append(self.output_shape)
        for other in declared:
            if other != shape:
                raise node.error(
                    f"makes {node.output!r} of shape {shape}, which is declared as {other}."
                )
