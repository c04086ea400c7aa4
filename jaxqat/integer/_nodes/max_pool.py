# pyright: strict
"""MaxPool: the largest code in each window."""

import dataclasses
from collections.abc import Sequence

from jaxqat.integer._nodes.base import Node, Padding, Shape, Tensor, window_shape


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Node):
    """Largest code in each window; padding is ignored. The output has the input's grid.

    Attributes:
        window: Size of the window along each spatial axis.
        strides: Stride along each spatial axis.
        padding: Padding before and after each spatial axis.
    """

    window: Shape
    strides: Shape
    padding: Padding

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the number of window positions along each spatial axis, and the channels."""
        ((*spatial, channels),) = inputs
        return (*window_shape(tuple(spatial), self.window, self.strides, self.padding), channels)

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check the window, and that the output has the zero point and the bounds of the input."""
        for source in inputs:
            self.check_window(source)
            if output is not None:
                self.check_same_grid(source, output, (source.low, source.high))
