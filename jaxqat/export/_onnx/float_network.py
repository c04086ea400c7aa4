"""The same network in float32: the baseline of benchmarks, and what other quantizers start from.

Weights are code * weight_scale and biases bias * scale_in * weight_scale, batch norm folded into
both. Nothing is rounded: a tensor's grid shows only as ReLU, where its smallest code is its zero
point, and as an upper bound, where it holds fewer codes than its grid's top, 127.
"""

from typing import Any

import numpy as np

from jaxqat.export._onnx import moves as onnx_moves
from jaxqat.export._onnx.builder import OPSET, Builder, channels_first, channels_last
from jaxqat.export._onnx.nodes import geometry, oriented_weights
from jaxqat.integer.graph import (
    CODE_MAX,
    Add,
    Concat,
    IntegerGraph,
    MaxPool,
    Move,
    Node,
    Product,
    Quantize,
    SumPool,
)


def float_model(graph: IntegerGraph, *, opset: int = OPSET) -> Any:
    """An integer network's float32 equivalent, as an `onnx.ModelProto`.

    Its input and output are those of `onnx_model(graph, input="float")`.

    Raises:
        ExportError: If ONNX has no form of a node; names it.
        ImportError: If the package `onnx` is not installed.
    """
    lowering = _FloatLowering(graph)
    for node in graph.nodes:
        lowering.write(node)
    result = lowering.values[graph.output]
    rank = 1 + len(graph.output_shape)
    builder = lowering.builder
    builder.rename(builder.transpose(result, channels_last(rank), "last"), "logits")
    return builder.model(
        [("images", np.float32, graph.input_shape)],
        [("logits", np.float32, graph.output_shape)],
        opset=opset,
        properties={},
    )


class _FloatLowering:
    """Writes nodes; `values` holds the ONNX name of each tensor, channels first."""

    def __init__(self, graph: IntegerGraph):
        self.graph, self.builder = graph, Builder()
        self.values: dict[str, str] = {}
        self._image = self.builder.name("images")

    def write(self, node: Node) -> None:
        handler = {
            Quantize: self._quantize,
            Product: self._product,
            Add: self._add,
            MaxPool: self._max_pool,
            SumPool: self._sum_pool,
            Move: self._move,
            Concat: self._concat,
        }[type(node)]
        self.values[node.output] = self._bounded(node, handler(node))

    def _rank(self, node: Node) -> int:
        return 1 + len(self.graph.tensors[node.inputs[0]].shape)

    def _bounded(self, node: Node, value: str) -> str:
        out = self.graph.tensors.get(node.output)
        if out is None or isinstance(node, Quantize | Move | MaxPool | Concat):
            return value
        if out.low >= out.zero_point:
            value = self.builder.add("Relu", [value], f"{out.name}/relu")
        if out.high < CODE_MAX:
            top = np.float32((out.high - out.zero_point) * out.scale)
            top_name = self.builder.constant(top, f"{out.name}/high")
            value = self.builder.add("Clip", [value, "", top_name], f"{out.name}/clip")
        return value

    def _quantize(self, node: Quantize) -> str:
        rank = 1 + len(self.graph.input_shape)
        return self.builder.transpose(self._image, channels_first(rank), "channels_first")

    def _product(self, node: Product) -> str:
        spatial = self._rank(node) - 2
        real = node.weights.astype(np.float32) * node.weight_scale
        scale = self.graph.tensors[node.inputs[0]].scale * node.weight_scale
        inputs = [
            self.values[node.inputs[0]],
            self.builder.constant(
                oriented_weights(real, node.kind, spatial), f"{node.name}/weights"
            ),
            self.builder.constant((node.bias * scale).astype(np.float32), f"{node.name}/bias"),
        ]
        name = f"{node.name}/product"
        if spatial == 0:
            return self.builder.add("Gemm", inputs, name)
        return self.builder.add("Conv", inputs, name, **geometry(node, spatial))

    def _add(self, node: Add) -> str:
        terms = [self.values[name] for name in node.inputs]
        return terms[0] if len(terms) == 1 else self.builder.add("Add", terms, node.output)

    def _max_pool(self, node: MaxPool) -> str:
        return onnx_moves.max_pool(self.builder, node, self.values[node.inputs[0]])

    def _sum_pool(self, node: SumPool) -> str:
        source, out = self.graph.tensors[node.inputs[0]], self.graph.tensors.get(node.output)
        value = self.values[source.name]
        if node.drop_axes:
            value = self.builder.add("GlobalAveragePool", [value], f"{node.name}/mean")
            value = self.builder.add("Flatten", [value], f"{node.name}/flat")
        else:
            window = onnx_moves.window_attributes(node)
            window["count_include_pad"] = 1
            value = self.builder.add("AveragePool", [value], f"{node.name}/mean", **window)
        unit = node.multiplier * (1.0 if out is None else out.scale) / source.scale
        factor = float(unit) * np.prod(node.window)
        if abs(factor - 1) < 1e-5:  # An average, up to the roundings of its scales.
            return value
        factor = self.builder.constant(np.float32(factor), f"{node.name}/factor")
        return self.builder.add("Mul", [value, factor], f"{node.name}/scaled")

    def _move(self, node: Move) -> str:
        value, rank = self.values[node.inputs[0]], self._rank(node)
        return onnx_moves.move(self.builder, node, value, rank, np.float32(0))

    def _concat(self, node: Concat) -> str:
        values = [self.values[name] for name in node.inputs]
        return onnx_moves.concat(self.builder, node, values, self._rank(node))
