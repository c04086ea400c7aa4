"""Product: a convolution or a dense layer."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from jaxqat.integer._nodes.base import Node, Padding, Shape, Tensor, window_shape


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Product(Node):
    """A convolution or a dense layer on codes, with everything up to its output's codes.

        acc = sum((q - zero_point_in) * w)          int32; a border holds real zeros
        code = clip(round((acc + bias) * multiplier) + zero_point_out, low, high)

    Where the output is the network's (`output` names no tensor of the graph), the result is the
    real number (acc + bias) * multiplier.

    Attributes:
        kind: 'conv' or 'dense'.
        weights: int8. Convolution: (*window, inputs / groups, outputs); dense: (inputs, outputs).
            Their sign is such that every multiplier is positive.
        weight_bits: Width of their codes, 2 to 8: -(2**(bits-1)-1) .. 2**(bits-1)-1. In memory a
            code is a byte; saved, codes of up to 4 bits are packed (`packing`).
        bias: int32 (outputs,), in accumulator units.
        multiplier: float32 (outputs,): (scale_in * weight_scale) / scale_out, or
            scale_in * weight_scale for the network's output; each product and quotient rounded to
            float32.
        weight_scale: float32 (outputs,), positive: real units per weight code, batch norm's
            factor included.
        strides: Of a convolution's window, by spatial axis.
        padding: Zeros before and after each spatial axis.
        dilation: Of a convolution's window.
        groups: Of channels.
    """

    kind: Literal["conv", "dense"]
    weights: np.ndarray = dataclasses.field(metadata={"code_bits": "weight_bits"})
    bias: np.ndarray
    multiplier: np.ndarray
    weight_scale: np.ndarray
    weight_bits: int = 8
    strides: Shape = ()
    padding: Padding = ()
    dilation: Shape = ()
    groups: int = 1

    may_be_real: ClassVar[bool] = True

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.weights.shape[-1]

    @property
    def window(self) -> Shape:
        """Spatial extent of a convolution's kernel; () for a dense layer."""
        return self.weights.shape[:-2] if self.kind == "conv" else ()

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the positions of the window, or the axes before the last, and the channels."""
        ((*spatial, _),) = inputs
        if self.kind == "dense":
            return (*spatial, self.channels)
        positions = window_shape(
            tuple(spatial), self.window, self.strides, self.padding, self.dilation
        )
        return (*positions, self.channels)

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check types, shapes and bounds of the arrays, and that no accumulator leaves int32."""
        del output
        (source,) = inputs
        self._check_arrays()
        taken, channels = self.weights.shape[-2] * self.groups, source.shape[-1]
        if taken != channels:
            raise self.error(
                f"weights {self.weights.shape} in {self.groups} group(s) take {taken} channels, "
                f"but {source.name!r} has {channels}."
            )
        for field in ("multiplier", "weight_scale"):
            values = getattr(self, field)
            if not (np.isfinite(values) & (values > 0)).all():
                raise self.error(f"{field} is not positive and finite everywhere.")
        bound = self.accumulator_bound(source)
        if bound > np.iinfo(np.int32).max:
            raise self.error(
                f"its accumulator can reach {bound}, beyond int32 (sum of |w| times the largest "
                "code, plus the bias)."
            )

    def _check_arrays(self) -> None:
        types = {"weights": np.int8, "bias": np.int32}
        types |= {"multiplier": np.float32, "weight_scale": np.float32}
        for field, dtype in types.items():
            array = getattr(self, field)
            if array.dtype != dtype or (field != "weights" and array.shape != (self.channels,)):
                shape = "" if field == "weights" else f" ({self.channels},)"
                raise self.error(
                    f"{field} is {array.dtype.name} of shape {array.shape}; right would be "
                    f"{np.dtype(dtype).name}{shape}."
                )
        bits, largest = self.weight_bits, np.abs(self.weights.astype(int)).max(initial=0)
        if bits not in range(2, 9) or largest > 2 ** (bits - 1) - 1:
            raise self.error(
                f"weight_bits is {bits!r} and the largest weight code ±{largest}; right would be 2 "
                "to 8 bits, and codes up to ±(2**(bits - 1) - 1)."
            )

    def accumulator_bound(self, source: Tensor) -> int:
        """Return the largest magnitude that acc + bias can have, whatever codes it reads."""
        lowest, highest = source.low - source.zero_point, source.high - source.zero_point
        lowest, highest = min(lowest, 0), max(highest, 0)  # A border's taps meet real zeros.
        weights = self.weights.astype(np.int64).reshape(-1, self.channels)
        positive, negative = np.maximum(weights, 0).sum(0), np.minimum(weights, 0).sum(0)
        bias = self.bias.astype(np.int64)
        largest = bias + positive * highest + negative * lowest
        smallest = bias + positive * lowest + negative * highest
        return int(np.maximum(np.abs(largest), np.abs(smallest)).max(initial=0))
