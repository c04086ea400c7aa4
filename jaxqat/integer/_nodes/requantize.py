# pyright: strict
"""Requantize: a tensor put on another grid."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Requantize(Node):
    """Codes of a tensor on another grid, or within other bounds.

        code = clip(round((q - z) * multiplier) + zero_point_out, low, high)

    Attributes:
        multiplier: float32, scale / scale_out.
    """

    multiplier: np.float32

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the input's shape."""
        return inputs[0]

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that there is one input, and that the multiplier is positive and finite."""
        del output
        if len(inputs) != 1:
            raise self.error(f"has {len(inputs)} inputs; it requantizes one.")
        self.check_factors("multiplier", [self.multiplier])
