# pyright: strict
"""Quantize: codes of real numbers, those of an input of the network or of a float island."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Node):
    """Quantize real numbers.

        code = clip(round(((x + shifts) * factors + terms) * inverse) + zero_point, low, high)

    It reads an input of the network, or the real tensor that a `FloatOp` made.

    Attributes:
        inverse: float32 reciprocal of the output's scale, by which training multiplies too.
        shifts: What the model adds to its input first, float32 with the axes of an example; along
            one of size 1 it is repeated. None if it does not scale its input.
        factors: How it scales the input then, as by 1 / 255; likewise.
        terms: What it adds last; likewise.
        table: int8 code of every pixel value of a uint8 image, (256, channels), computed by the
            normalization and quantization of the training graph. None if the network takes float
            input only, or if it quantizes another tensor.
    """

    inverse: np.float32
    shifts: np.ndarray | None = None
    factors: np.ndarray | None = None
    terms: np.ndarray | None = None
    table: np.ndarray | None = None

    COEFFICIENTS: ClassVar[tuple[str, ...]] = ("shifts", "factors", "terms")

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the images, if the coefficients fit it."""
        (images,) = inputs
        for field, array in self.coefficients.items():
            self.check_broadcast(field, array, images)
        return images

    @property
    def coefficients(self) -> dict[str, np.ndarray]:
        """Shifts, factors and terms by their field; none if the input is not scaled."""
        fields = {field: getattr(self, field) for field in self.COEFFICIENTS}
        return {field: array for field, array in fields.items() if array is not None}

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check the numbers, and that a table has an int8 code for each value of each channel."""
        del inputs
        if len(self.inputs) != 1:
            raise self.error(f"quantizes one real tensor, got {len(self.inputs)}.")
        self.check_factors("inverse", (self.inverse,))
        missing = [field for field in self.COEFFICIENTS if field not in self.coefficients]
        if missing and self.coefficients:
            raise self.error(f"has {' and '.join(self.coefficients)} without {missing[0]}.")
        for field, array in self.coefficients.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise self.error(f"{field} must be float32 and finite, got {array.dtype} {array}.")
        if self.table is None or output is None:
            return
        shape = (256, *output.shape[-1:])
        if self.table.dtype != np.int8 or self.table.shape != shape:
            raise self.error(
                f"table must be int8 {shape}, one code for each value of each channel, got "
                f"{self.table.dtype.name} {self.table.shape}."
            )
