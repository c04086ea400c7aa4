# pyright: strict
"""Concat: concatenation of tensors."""

import dataclasses
from collections.abc import Sequence

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Node):
    """Concatenation of tensors that are all on the output's grid.

    Attributes:
        axis: Axis of the concatenation; the batch is axis 0.
    """

    axis: int

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the inputs, with the sum of their sizes along the axis."""
        axis = self.axis - 1
        if not all(0 <= axis < len(shape) for shape in inputs):
            raise self.error(f"concatenates along axis {self.axis}, which an input lacks.")
        others = {(*shape[:axis], *shape[axis + 1 :]) for shape in inputs}
        if len(others) != 1:
            raise self.error(
                f"concatenates the shapes {', '.join(map(str, inputs))} along axis {self.axis}; "
                "their other axes must be the same."
            )
        total = sum(shape[axis] for shape in inputs)
        return (*inputs[0][:axis], total, *inputs[0][axis + 1 :])

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that all inputs have the output's zero point; their bounds may differ."""
        if output is not None:
            for source in inputs:
                self.check_same_grid(source, output, None)
