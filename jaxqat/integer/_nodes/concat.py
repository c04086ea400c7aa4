"""Concat: tensors side by side."""

import dataclasses
from collections.abc import Sequence

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Node):
    """Tensors side by side, all of them on the output's grid already.

    Attributes:
        axis: Counting the batch as axis 0.
    """

    axis: int

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the parts, with the sum of their extents along the axis."""
        place = self.axis - 1
        others = {(*shape[:place], *shape[place + 1 :]) for shape in inputs}
        if len(others) != 1:
            raise self.error(f"joins {', '.join(map(str, inputs))} along axis {self.axis}.")
        total = sum(shape[place] for shape in inputs)
        return (*inputs[0][:place], total, *inputs[0][place + 1 :])

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that all parts have the output's zero point; their bounds may differ."""
        if output is not None:
            for source in inputs:
                self.check_same_grid(source, output, None)
