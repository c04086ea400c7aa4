"""An integer network in float32 as ONNX: a baseline, and the input of other quantizers.

`FloatVisitor` defines the float network; this module writes its ONNX nodes.
"""

from typing import Any

import numpy as np

from jaxqat.errors import ExportError
from jaxqat.export._onnx import moves as onnx_moves
from jaxqat.export._onnx.builder import (
    OPSET,
    Builder,
    channels_first,
    channels_last,
    input_names,
    output_name,
)
from jaxqat.export._onnx.products import geometry, mat_mul, oriented_weights, scaled
from jaxqat.integer._float_visitor import FloatVisitor
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
    SumPool,
    Table,
)


def float_model(graph: IntegerGraph, *, opset: int = OPSET) -> Any:
    """Return the float32 equivalent of an integer network as an `onnx.ModelProto`.

    It has the input and output of `onnx_model(graph, input="float")`.

    Raises:
        ExportError: If a node has no ONNX equivalent; names the node.
        MissingPackageError: If the package `onnx` is not installed.
    """
    writer = OnnxFloatWriter(graph)
    builder, outputs = writer.builder, graph.outputs
    given = [builder.name(name) for name in input_names(graph.inputs)]
    values = writer.visit(given)
    names = [builder.name(output_name(output)) for output in outputs]
    real = [
        builder.transpose(values[o.name], channels_last(1 + len(o.shape)), "last") for o in outputs
    ]
    builder.rename_all(real, names)
    return builder.model(
        [(name, np.float32, i.shape) for name, i in zip(given, graph.inputs, strict=True)],
        [(name, np.float32, o.shape) for name, o in zip(names, outputs, strict=True)],
        opset=opset,
        properties={},
    )


class OnnxFloatWriter(FloatVisitor[str]):
    """Write each node in float; values are names of ONNX tensors, channels first.

    Attributes:
        builder: The ONNX graph so far.
    """

    def __init__(self, graph: IntegerGraph):
        super().__init__(graph)
        self.builder = Builder()

    def bound(self, node: Node, x: str, low: float | None, high: float | None) -> str:
        """Write a ReLU, an upper bound, or both."""
        if low is not None:
            x = self.builder.add("Relu", [x], f"{node.output}/relu")
        if high is not None:
            top = self.builder.constant(np.float32(high), f"{node.output}/high")
            x = self.builder.add("Clip", [x, "", top], f"{node.output}/clip")
        return x

    def quantize(self, node: Quantize, x: str) -> str:
        """Write the transposition to ONNX's layout."""
        rank = 1 + len(self.graph.tensors[node.output].shape)
        x = scaled(self.builder, node, x)
        return self.builder.transpose(x, channels_first(rank), "channels_first")

    def product(self, node: Product, arrays: Any, x: str) -> str:
        """Write a Conv or a Gemm."""
        weights, bias = self.folded(node)
        spatial = self._rank(node) - 2
        weights = oriented_weights(weights, node.kind, spatial)
        inputs = [
            x,
            self.builder.constant(weights, f"{node.name}/weights"),
            self.builder.constant(bias, f"{node.name}/bias"),
        ]
        name = f"{node.name}/product"
        if spatial == 0:
            return self.builder.add("Gemm", inputs, name)
        return self.builder.add("Conv", inputs, name, **geometry(node, spatial))

    def add(self, node: Add, inputs: list[str]) -> str:
        """Write an Add."""
        return self.builder.add("Add", inputs, node.output)

    def affine(self, node: Affine, x: str) -> str:
        """Write a Mul and an Add of constants."""
        for operator, numbers in zip(("Mul", "Add"), self.affine_numbers(node), strict=True):
            numbers = numbers.transpose(channels_first(numbers.ndim))
            name = f"{node.name}/{operator.lower()}"
            x = self.builder.add(operator, [x, self.builder.constant(numbers, f"{name}/by")], name)
        return x

    def multiply(self, node: Multiply, inputs: list[str]) -> str:
        """Write a Mul."""
        return self.builder.add("Mul", inputs, node.output)

    def mat_mul(self, node: MatMul, inputs: list[str]) -> str:
        """Write a MatMul."""
        shapes = [self.graph.tensors[name].shape for name in node.inputs]
        product = mat_mul(self.builder, node, "MatMul", inputs, shapes)
        axes = channels_first(1 + len(node.output_shape(shapes)))
        return self.builder.transpose(product, axes, f"{node.name}/channels_first")

    def max_pool(self, node: MaxPool, x: str) -> str:
        """Write a MaxPool."""
        return onnx_moves.max_pool(self.builder, node, x)

    def sum_pool(self, node: SumPool, x: str) -> str:
        """Write an average pool, and a factor if the result is not the plain average."""
        if node.drop_axes:
            x = self.builder.add("GlobalAveragePool", [x], f"{node.name}/mean")
            x = self.builder.add("Flatten", [x], f"{node.name}/flat")
        else:
            window = onnx_moves.window_attributes(node)
            window["count_include_pad"] = 1
            x = self.builder.add("AveragePool", [x], f"{node.name}/mean", **window)
        factor = self.pool_factor(node) * np.prod(node.window)
        if abs(factor - 1) < 1e-5:  # The plain average, except for rounded scales.
            return x
        factor_name = self.builder.constant(np.float32(factor), f"{node.name}/factor")
        return self.builder.add("Mul", [x, factor_name], f"{node.name}/scaled")

    def move(self, node: Move, x: str) -> str:
        """Write a move."""
        return onnx_moves.move(self.builder, node, x, self._rank(node), np.float32(0))

    def concat(self, node: Concat, inputs: list[str]) -> str:
        """Write a Concat."""
        return onnx_moves.concat(self.builder, node, inputs, self._rank(node))

    def table(self, node: Table, x: str) -> str:
        """Refuse: a table has no function of real numbers."""
        raise ExportError(f"node {node.name!r}: a float network with tables is not written.")

    def float_op(self, node: FloatOp, inputs: list[str]) -> str:
        """Refuse: this baseline is of networks that are integer throughout."""
        raise ExportError(f"node {node.name!r}: a float network with islands is not written.")

    def _rank(self, node: Node) -> int:
        return 1 + len(self.graph.tensors[node.inputs[0]].shape)
