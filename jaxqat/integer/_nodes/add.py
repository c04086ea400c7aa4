"""Add: a residual addition, or one tensor put on another grid."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Add(Node):
    """Sum of one or two tensors on the output's grid; with one, a requantization.

        code = clip(sum_i round((q_i - z_i) * multiplier_i) + zero_point_out, low, high)

    Attributes:
        multipliers: float32, scale_i / scale_out for each input. That of the branch of a residual
            addition is an exact power of two.
    """

    multipliers: tuple[np.float32, ...]

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the terms, which must be equal."""
        if len(set(inputs)) != 1:
            raise self.error(f"adds the shapes {', '.join(map(str, inputs))}, which differ.")
        return inputs[0]

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that there is a positive, finite multiplier for each input."""
        del output
        if len(self.multipliers) != len(inputs):
            raise self.error(f"has {len(self.multipliers)} multipliers for {len(inputs)} inputs.")
        self.check_factors("multipliers", self.multipliers)
