# pyright: strict
"""Multiply: the product of two tensors, element by element."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Multiply(Node):
    """Product of two tensors, such as one and its gate, rounded once.

        code = clip(round((q_1 - z_1) (q_2 - z_2) * multiplier) + zero_point_out, low, high)

    An axis of size 1 is repeated along the other tensor's.

    Attributes:
        multiplier: float32, scale_1 * scale_2 / scale_out.
    """

    multiplier: np.float32

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of both inputs together, axes of size 1 repeated."""
        try:
            return np.broadcast_shapes(*inputs)
        except ValueError:
            shapes = " and ".join(map(str, inputs))
            raise self.error(f"multiplies the shapes {shapes}, which do not fit.") from None

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that there are two inputs of one rank, and that the multiplier is positive."""
        if len(inputs) != 2 or output is None:
            raise self.error(f"has {len(inputs)} inputs; it makes codes of the product of two.")
        if len(inputs[0].shape) != len(inputs[1].shape):
            shapes = " and ".join(str(x.shape) for x in inputs)
            raise self.error(f"multiplies the shapes {shapes}, which have different ranks.")
        self.check_factors("multiplier", [self.multiplier])
