"""Base class of every walk over an integer graph: one value per node, one method per node kind.

Execution, ONNX export and the float networks are visitors. A new node kind needs a case in
`GraphVisitor.node` and an abstract method here, so that every visitor must implement it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from jaxqat.integer.graph import (
    Add,
    Affine,
    Concat,
    FloatOp,
    IntegerGraph,
    MatMul,
    MaxPool,
    Move,
    Multiply,
    Node,
    Product,
    Quantize,
    Requantize,
    SumPool,
    Table,
)

Value = TypeVar("Value")


class GraphVisitor(ABC, Generic[Value]):
    """Compute a value for each node of a graph.

    Attributes:
        graph: Graph to visit.
    """

    def __init__(self, graph: IntegerGraph):
        self.graph = graph

    def visit(
        self, inputs: Sequence[Value], parameters: Mapping[str, Any] | None = None
    ) -> dict[str, Value]:
        """Return the value of each node, by the name of its output.

        Args:
            inputs: Values of the network's inputs, in their order.
            parameters: Arrays of each product by the node's name, for visitors that take them
                as arguments.
        """
        given = [each.name for each in self.graph.inputs]
        values: dict[str, Value] = dict(zip(given, inputs, strict=True))
        for node in self.visited_nodes():
            values[node.output] = self.node(node, values, parameters or {})
        for name in given:
            del values[name]
        return values

    def visited_nodes(self) -> Iterable[Node]:
        """Return the nodes to visit, in order."""
        return self.graph.nodes

    def node(
        self,
        node: Node,
        values: Mapping[str, Value],
        parameters: Mapping[str, Any],
    ) -> Value:
        """Return the value of one node, given the values of the nodes before it."""
        inputs = [values[name] for name in node.inputs]
        match node:
            case Quantize():
                return self.quantize(node, inputs[0])
            case Product():
                return self.product(node, parameters.get(node.name), inputs[0])
            case MatMul():
                return self.mat_mul(node, inputs)
            case Add():
                return self.add(node, inputs)
            case Multiply():
                return self.multiply(node, inputs)
            case Affine():
                return self.affine(node, inputs[0])
            case Requantize():
                return self.requantize(node, inputs[0])
            case Table():
                return self.table(node, inputs[0])
            case MaxPool():
                return self.max_pool(node, inputs[0])
            case SumPool():
                return self.sum_pool(node, inputs[0])
            case Move():
                return self.move(node, inputs[0])
            case Concat():
                return self.concat(node, inputs)
            case FloatOp():
                return self.float_op(node, inputs)
        raise TypeError(f"node {node.name!r}: {type(node).__name__} is not a known node kind.")

    @abstractmethod
    def quantize(self, node: Quantize, x: Value) -> Value:
        """Visit the quantization of an input, or of a real tensor."""

    @abstractmethod
    def product(self, node: Product, arrays: Any, x: Value) -> Value:
        """Visit a convolution or a dense layer; `arrays` are its parameters, if given."""

    @abstractmethod
    def mat_mul(self, node: MatMul, inputs: list[Value]) -> Value:
        """Visit a product of two tensors over common axes."""

    @abstractmethod
    def add(self, node: Add, inputs: list[Value]) -> Value:
        """Visit a residual addition."""

    @abstractmethod
    def multiply(self, node: Multiply, inputs: list[Value]) -> Value:
        """Visit a product of two tensors, element by element."""

    @abstractmethod
    def affine(self, node: Affine, x: Value) -> Value:
        """Visit factors and terms that are numbers of the network."""

    @abstractmethod
    def requantize(self, node: Requantize, x: Value) -> Value:
        """Visit a requantization."""

    @abstractmethod
    def table(self, node: Table, x: Value) -> Value:
        """Visit a function that is a table."""

    @abstractmethod
    def max_pool(self, node: MaxPool, x: Value) -> Value:
        """Visit a max pool."""

    @abstractmethod
    def sum_pool(self, node: SumPool, x: Value) -> Value:
        """Visit an average pool."""

    @abstractmethod
    def move(self, node: Move, x: Value) -> Value:
        """Visit a move."""

    @abstractmethod
    def concat(self, node: Concat, inputs: list[Value]) -> Value:
        """Visit a concatenation."""

    @abstractmethod
    def float_op(self, node: FloatOp, inputs: list[Value]) -> Value:
        """Visit an operation on real numbers; codes among the inputs are not dequantized yet."""
