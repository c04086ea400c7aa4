# pyright: strict
"""The integer network as plain data: int8 tensors, and the operations between them.

Every tensor between two operations is int8 on a grid of its own, real = scale * (code -
zero_point), and every operation reads codes and makes codes. The requantizations are those of
Jacob et al. 2018 (arXiv:1712.05877, section 2.2), with batch norm and zero points folded into an
integer bias that is added before the one multiplication,

    code = clip(round((acc + bias) * multiplier) + zero_point, low, high),

where acc + bias is an int32 sum, converted to float32 once, and low and high are the smallest and
the largest code that the output holds: a ReLU is no more than a higher `low`. With `fixed_point`
the product and the rounding are integer as well (`arithmetic`). Arrays are NumPy's; nothing here
computes, and nothing needs JAX.

Each kind of node has a file in `jaxqat.integer._nodes` with its fields, invariants and shape. What
is done with a graph (execution, export) is a `GraphVisitor` with one method for each kind.
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


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class IntegerGraph:
    """An integer network.

    Invariants, checked when it is made: nodes stand in an order in which each reads what earlier
    ones made; every tensor is made once and has the shape that its node gives it; what only moves
    codes keeps their bounds; arrays have the stated types and shapes; codes fit int8; scales and
    multipliers are positive and finite; no accumulator can leave int32.

    Attributes:
        input_shape: Of one example, without the batch; the input is float32, and uint8 too if the
            `Quantize` node has a table.
        tensors: By name.
        nodes: In order of execution.
        output: Name of the network's result: a tensor of `tensors` (its real values are the
            result), or the output of the last product or pool, which is real then.
        output_shape: Of one example's result.
        requantization: 'float' (one float32 multiplication and a rounding) or 'fixed_point'
            (int32 multiplier and rounding shift).
        metadata: Free text about it: 'labels' (class names), where it came from.

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
        made: set[str] = set()
        for tensor in self.tensors.values():
            tensor.check()
        for node in self.nodes:
            self._check_order(node, made)
            inputs = [self.tensors[name] for name in node.inputs]
            node.check(inputs, self.tensors.get(node.output))
            self._check_shape(node)
            made.add(node.output)
        missing = [name for name in (*self.tensors, self.output) if name not in made]
        if missing:
            raise GraphError(f"no node makes {missing[0]!r}.")
        if sum(isinstance(node, Quantize) for node in self.nodes) != 1:
            raise GraphError("a graph has one Quantize node.")

    @property
    def quantize(self) -> Quantize:
        """The node that reads the input."""
        return next(node for node in self.nodes if isinstance(node, Quantize))

    def products(self) -> Iterator[Product]:
        """Yield convolutions and dense layers, in order."""
        return (node for node in self.nodes if isinstance(node, Product))

    def readers(self, tensor: str) -> list[Node]:
        """Return the nodes that read the tensor of this name."""
        return [node for node in self.nodes if tensor in node.inputs]

    def size_bytes(self) -> int:
        """Return the bytes of what the network needs, as saved.

        These are packed weights, an int32 bias and a float32 multiplier for each output channel.
        """
        return sum(
            packed_size(p.weights.size, p.weight_bits) + p.bias.nbytes + p.multiplier.nbytes
            for p in self.products()
        )

    def _check_order(self, node: Node, made: set[str]) -> None:
        missing = [name for name in node.inputs if name not in made]
        # The network's real result is no tensor, so no node can read it.
        missing += [name for name in node.inputs if name not in self.tensors]
        if missing:
            raise node.error(f"reads {missing[0]!r}, which no node before it makes.")
        if node.output in made:
            raise node.error(f"makes {node.output!r}, which is made already.")
        real = node.may_be_real and node.output == self.output
        if node.output not in self.tensors and not real:
            raise node.error(f"makes {node.output!r}, which is no tensor of the graph.")

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
