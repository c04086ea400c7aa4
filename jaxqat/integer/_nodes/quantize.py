# pyright: strict
"""Quantize: codes of real numbers, those of an input of the network or of a float island."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Node):
    """Quantize real numbers: clip(round(x * inverse) + zero_point, low, high).

    It reads an input of the network, or the real tensor that a `FloatOp` made.

    Attributes:
        inverse: float32 reciprocal of the output's scale, by which training multiplies too.
        table: int8 code of every pixel value of a uint8 image, (256, channels), computed by the
            normalization and quantization of the training graph. None if the network takes float
            input only, or if it quantizes another tensor.
    """

    inverse: np.float32
    table: np.ndarray | None = None

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the images."""
        (images,) = inputs
        return images

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check `inverse`, and that a table has an int8 code for each value of each channel."""
        del inputs
        if len(self.inputs) != 1:
            raise self.error(f"quantizes one real tensor, got {len(self.inputs)}.")
        self.check_factors("inverse", (self.inverse,))
        if self.table is None or output is None:
            return
        shape = (256, *output.shape[-1:])
        if self.table.dtype != np.int8 or self.table.shape != shape:
            raise self.error(
                f"table must be int8 {shape}, one code for each value of each channel, got "
                f"{self.table.dtype.name} {self.table.shape}."
            )
