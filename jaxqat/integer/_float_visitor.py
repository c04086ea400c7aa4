"""An integer graph in float: the baseline for comparisons with integers.

Weights are code * weight_scale and biases are bias * scale_in * weight_scale. Batch norm is folded
into both, so the float and the integer network have the same operations. Nothing is rounded to a
grid. The bounds of a tensor remain: a ReLU if its smallest code is its zero point or larger, and an
upper bound if its largest code is below 127.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from jaxqat.integer._visitor import GraphVisitor
from jaxqat.integer.graph import (
    CODE_MAX,
    Affine,
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
    """Compute a graph in float; a subclass implements the operations in one library."""

    def folded(self, node: Product) -> tuple[np.ndarray, np.ndarray]:
        """Return the float32 weights and bias of a product, with batch norm folded in."""
        scale = self.graph.tensors[node.inputs[0]].scale * node.weight_scale
        weights = node.weights.astype(np.float32) * node.weight_scale
        return weights, (node.bias * scale).astype(np.float32)

    def pool_factor(self, node: SumPool) -> float:
        """Return the factor from the sum over a window to the result of the pool."""
        source, out = self.graph.tensors[node.inputs[0]], self.graph.tensors.get(node.output)
        return float(node.multiplier * (1.0 if out is None else out.scale) / source.scale)

    def node(
        self,
        node: Node,
        values: Mapping[str, Value],
        parameters: Mapping[str, Any],
    ) -> Value:
        """Compute one node and clip it to the bounds of its output."""
        x = super().node(node, values, parameters)
        out = self.graph.tensors.get(node.output)
        if out is None or isinstance(node, Quantize | Move | MaxPool | Concat):
            return x
        low = 0.0 if out.low >= out.zero_point else None
        high = float((out.high - out.zero_point) * out.scale) if out.high < CODE_MAX else None
        return x if low is None and high is None else self.bound(node, x, low, high)

    def affine_numbers(self, node: Affine) -> tuple[np.ndarray, np.ndarray]:
        """Return the float32 factors and terms of a node, with an axis of size 1 for the batch."""
        source, out = self.graph.tensors[node.inputs[0]], self.graph.tensors[node.output]
        unit = node.multiplier * out.scale
        factors, terms = node.weights * unit / source.scale, node.bias * unit
        return factors[None].astype(np.float32), terms[None].astype(np.float32)

    def requantize(self, node: Requantize, x: Value) -> Value:
        """Return the tensor: a grid shows only in bounds."""
        return x

    @abstractmethod
    def bound(self, node: Node, x: Value, low: float | None, high: float | None) -> Value:
        """Clip values to bounds; None means no bound."""
