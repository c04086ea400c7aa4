"""The same network in float: the baseline that integers are compared with.

Weights are code * weight_scale and biases bias * scale_in * weight_scale, batch norm folded into
both as in the integer network, so that neither side does more than the other. Nothing is rounded
to a grid; a tensor's grid shows only as ReLU, where its smallest code is its zero point, and as an
upper bound, where the largest code that it holds is below 127.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from jaxqat.integer._visitor import GraphVisitor
from jaxqat.integer.graph import (
    CODE_MAX,
    Concat,
    MaxPool,
    Move,
    Node,
    Product,
    Quantize,
    Requantize,
    SumPool,
)

Value = TypeVar("Value")


class FloatVisitor(GraphVisitor[Value]):
    """Computes a graph in float; a subclass knows the operations of one library."""

    def folded(self, node: Product) -> tuple[np.ndarray, np.ndarray]:
        """Return the float32 weights and bias of a product."""
        scale = self.graph.tensors[node.inputs[0]].scale * node.weight_scale
        weights = node.weights.astype(np.float32) * node.weight_scale
        return weights, (node.bias * scale).astype(np.float32)

    def pool_factor(self, node: SumPool) -> float:
        """Return the factor from the sum of a window's values to the pool's result."""
        source, out = self.graph.tensors[node.inputs[0]], self.graph.tensors.get(node.output)
        return float(node.multiplier * (1.0 if out is None else out.scale) / source.scale)

    def node(
        self,
        node: Node,
        values: Mapping[str, Value],
        images: Value,
        parameters: Mapping[str, Any],
    ) -> Value:
        """Compute one node, within the bounds of its output."""
        x = super().node(node, values, images, parameters)
        out = self.graph.tensors.get(node.output)
        if out is None or isinstance(node, Quantize | Move | MaxPool | Concat):
            return x
        low = 0.0 if out.low >= out.zero_point else None
        high = float((out.high - out.zero_point) * out.scale) if out.high < CODE_MAX else None
        return x if low is None and high is None else self.bound(node, x, low, high)

    def requantize(self, node: Requantize, x: Value) -> Value:
        """Return the tensor: a grid shows only in bounds."""
        return x

    @abstractmethod
    def bound(self, node: Node, x: Value, low: float | None, high: float | None) -> Value:
        """Return values within bounds; None is no bound."""
