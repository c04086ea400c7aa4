# pyright: strict
"""Table: a function of one tensor, element by element."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxqat.integer._nodes.base import CODE_MIN, Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Table(Node):
    """A function of one tensor, such as swish: code = table[q + 128].

    Attributes:
        table: The output's code for each input code from -128 on, int8 of the shape (256,), or
            (256, channels) if channels have functions of their own, as in PReLU.
    """

    table: np.ndarray

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the input's shape."""
        return inputs[0]

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that there is one input, and a code of the output for each of its codes."""
        if len(inputs) != 1 or output is None:
            raise self.error(f"makes codes of one tensor's codes, and has {len(inputs)} inputs.")
        shapes = [(256,), (256, *inputs[0].shape[-1:])]
        if self.table.dtype != np.int8 or self.table.shape not in shapes:
            raise self.error(
                "its table must be int8[256], or int8[256, channels], got "
                f"{self.table.dtype}{list(self.table.shape)}."
            )
        used = self.table[inputs[0].low - CODE_MIN : inputs[0].high - CODE_MIN + 1]
        if used.min() < output.low or used.max() > output.high:
            raise self.error(
                f"its table makes codes {used.min()}..{used.max()}, and {output.name!r} holds "
                f"{output.low}..{output.high}."
            )
