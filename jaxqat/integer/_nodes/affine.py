# pyright: strict
"""Affine: factors and terms that are numbers of the network, such as a position embedding."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Affine(Node):
    """A tensor with factors and terms that differ by place, rounded once.

        code = clip(round(((q - z) * weights + bias) * multiplier) + zero_point_out, low, high)

    Each array has the tensor's axes, without the batch; along one of size 1 it is repeated.

    Attributes:
        weights: int32; 0 where the result does not depend on the tensor. A term is rounded to
            scale / weight, so weights are large.
        bias: int32.
        multiplier: float32, scale * weight_scale / scale_out.
    """

    weights: np.ndarray
    bias: np.ndarray
    multiplier: np.ndarray

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the input's shape, if the arrays fit it."""
        (shape,) = inputs
        for field in ("weights", "bias", "multiplier"):
            self.check_broadcast(field, getattr(self, field), shape)
        return shape

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that there is one input, and the arrays' types, signs and sums."""
        if len(inputs) != 1 or output is None:
            raise self.error(f"makes codes of one tensor's codes, and has {len(inputs)} inputs.")
        for field, dtype in (("weights", "int32"), ("bias", "int32"), ("multiplier", "float32")):
            found = getattr(self, field).dtype
            if found != dtype:
                raise self.error(f"{field} must be {dtype}, got {found}.")
        self.check_factors("multiplier", self.multiplier.reshape(-1))
        farthest = max(
            abs(bound - inputs[0].zero_point) for bound in (inputs[0].low, inputs[0].high)
        )
        largest = farthest * _largest(self.weights) + _largest(self.bias)
        if largest >= 2**31:
            raise self.error(f"its sums may reach {largest:,}; int32 holds less than 2**31.")


def _largest(array: np.ndarray) -> int:
    return int(np.abs(array.astype(np.int64)).max(initial=0))
