"""Quantize: the network's float input becomes codes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Node):
    """The network's float input becomes codes: clip(round(x * inverse) + zero_point, low, high).

    It has no `inputs`; the graph has one such node.

    Attributes:
        inverse: float32 reciprocal of the output's scale, as training multiplies by it.
        table: Codes of uint8 images, (256, channels): normalization and quantization of every
            value that a pixel can have, computed by the training graph's own program. None if the
            network takes float input only.
    """

    inverse: np.float32
    table: np.ndarray | None = None

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the images."""
        (images,) = inputs
        return images

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check the factor, and that a table has an int8 code for each value of each channel."""
        del inputs
        self.check_factors("inverse", (self.inverse,))
        if self.table is None or output is None:
            return
        shape = (256, *output.shape[-1:])
        if self.table.dtype != np.int8 or self.table.shape != shape:
            raise self.error(
                f"table is {self.table.dtype.name} of shape {self.table.shape}; right would be "
                f"int8 {shape}, one code for each value of each channel."
            )
