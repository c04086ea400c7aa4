"""MaxPool: the largest code in each window."""

import dataclasses
from collections.abc import Sequence

from jaxqat.integer._nodes.base import Node, Padding, Shape, Tensor, window_shape


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Node):
    """Largest code in each window; a border never wins. The grid stays.

    Attributes:
        window: Extent by spatial axis.
        strides: By spatial axis.
        padding: Before and after each spatial axis.
    """

    window: Shape
    strides: Shape
    padding: Padding

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the positions of the window, and the channels."""
        ((*spatial, channels),) = inputs
        return (*window_shape(tuple(spatial), self.window, self.strides, self.padding), channels)

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that the codes stay on their grid."""
        if output is not None:
            for source in inputs:
                self.check_same_grid(source, output, (source.low, source.high))
