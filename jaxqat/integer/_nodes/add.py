# pyright: strict
"""Add: a residual addition."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor

# float32 holds integers below this.
_EXACT = 2**24
_CODES = 255


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Add(Node):
    """Sum of two tensors on a third grid, rounded once, half to even.

        code = clip(round(sum_i (q_i - z_i) * factor_i / 2**shift + zero_point_out), low, high)

    All intermediate results are integers over 2**shift, small enough for float32 to hold them.

    Attributes:
        factors: Positive integer for each input; factor_i / 2**shift is scale_i / scale_out,
            rounded.
        shift: Integer from 0 to 15.
    """

    factors: tuple[int, ...]
    shift: int

    @property
    def multipliers(self) -> tuple[np.float32, ...]:
        """The factors over 2**shift, which float32 holds exactly."""
        return tuple(np.float32(factor / 2**self.shift) for factor in self.factors)

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the terms, which must be equal."""
        if len(set(inputs)) != 1:
            raise self.error(f"adds the shapes {', '.join(map(str, inputs))}, which differ.")
        return inputs[0]

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that there are two terms, and that float32 holds every sum."""
        del output
        if len(inputs) != 2 or len(self.factors) != 2:
            raise self.error(
                f"has {len(inputs)} inputs and {len(self.factors)} factors; a sum has two of each."
            )
        if not 0 <= self.shift <= 15 or min(self.factors) < 1:
            raise self.error(
                f"has the factors {self.factors} over 2**{self.shift}; factors are positive, and "
                "shift is from 0 to 15."
            )
        if _CODES * (sum(self.factors) + 2**self.shift) >= _EXACT:
            raise self.error(
                f"has the factors {self.factors} over 2**{self.shift}, whose sums may reach 2**24; "
                "float32 does not hold them exactly."
            )
