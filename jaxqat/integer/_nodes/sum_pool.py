# pyright: strict
"""SumPool: average pooling."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxqat.integer._nodes.base import Node, Padding, Shape, Tensor, window_shape


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SumPool(Node):
    """Average pooling: clip(round(sum(q - zero_point_in) * multiplier) + zero_point, low, high).

    If `output` names no tensor of the graph, it is the network's real result,
    sum(...) * multiplier.

    Attributes:
        window: Size of the window along each spatial axis; with `drop_axes`, the whole axis.
        strides: Stride along each spatial axis.
        padding: Zeros before and after each spatial axis.
        drop_axes: Whether to reduce over all spatial axes: (n, h, w, c) to (n, c).
        multiplier: float32 factor of the sum.
    """

    window: Shape
    strides: Shape
    padding: Padding
    drop_axes: bool
    multiplier: np.float32

    may_be_real: ClassVar[bool] = True

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the window positions, unless they are reduced, and the channels."""
        ((*spatial, channels),) = inputs
        if self.drop_axes:
            return (channels,)
        return (*window_shape(tuple(spatial), self.window, self.strides, self.padding), channels)

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check the window, and that the multiplier is positive and finite."""
        del output
        for source in inputs:
            self.check_window(source)
        self.check_factors("multiplier", (self.multiplier,))
