# pyright: strict
"""Product: a convolution or a dense layer."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from jaxqat.integer._nodes.base import Node, Padding, Shape, Tensor, window_shape


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Product(Node):
    """A convolution or a dense layer on codes, with its requantization.

        acc = sum((q - zero_point_in) * w)          int32; padding holds real zeros
        code = clip(round((acc + bias) * multiplier) + zero_point_out, low, high)

    If `output` names no tensor of the graph, it is the network's real result,
    (acc + bias) * multiplier.

    Attributes:
        kind: 'conv' or 'dense'.
        weights: int8. Convolution: (*window, inputs / groups, outputs); dense: (inputs, outputs).
            Their signs are chosen so that every multiplier is positive.
        weight_bits: Width of the weight codes, 2 to 8: -(2**(bits-1)-1) .. 2**(bits-1)-1. Codes
            take one byte each in memory; files pack codes of up to 4 bits (`_packing`).
        bias: int32 (outputs,), in accumulator units.
        multiplier: float32 (outputs,): (scale_in * weight_scale) / scale_out, or
            scale_in * weight_scale for the network's real result; each product and quotient is
            rounded to float32.
        weight_scale: float32 (outputs,), positive: real units per weight code, including the
            factor of batch norm.
        strides: Stride of a convolution along each spatial axis.
        padding: Zeros before and after each spatial axis.
        dilation: Dilation of a convolution along each spatial axis.
        groups: Number of channel groups.
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
        """Number of output channels."""
        return self.weights.shape[-1]

    @property
    def window(self) -> Shape:
        """Spatial shape of a convolution's kernel; () for a dense layer."""
        return self.weights.shape[:-2] if self.kind == "conv" else ()

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the window positions (dense: the axes before the last) and the channels."""
        ((*spatial, _),) = inputs
        if self.kind == "dense":
            return (*spatial, self.channels)
        positions = window_shape(
            tuple(spatial), self.window, self.strides, self.padding, self.dilation
        )
        return (*positions, self.channels)

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check the arrays' dtypes, shapes and bounds, and that no accumulator overflows int32."""
        del output
        (source,) = inputs
        self._check_arrays()
        self._check_geometry(source)
        expected, channels = self.weights.shape[-2] * self.groups, source.shape[-1]
        if expected != channels:
            raise self.error(
                f"weights {self.weights.shape} in {self.groups} group(s) need {expected} channels, "
                f"but {source.name!r} has {channels}."
            )
        for field in ("multiplier", "weight_scale"):
            values = getattr(self, field)
            if not (np.isfinite(values) & (values > 0)).all():
                raise self.error(f"{field} is not positive and finite everywhere.")
        bound = self.accumulator_bound(source)
        if bound > np.iinfo(np.int32).max:
            raise self.error(f"its accumulator, bias included, can reach {bound}, beyond int32.")

    def _check_geometry(self, source: Tensor) -> None:
        rank = len(source.shape) + 1 if self.kind == "conv" else 2
        if self.weights.ndim != rank:
            raise self.error(
                f"weights of a {self.kind} on {source.shape} have {rank} axes, got "
                f"{self.weights.shape}."
            )
        if self.kind == "conv":
            self.check_window(source, dilation=self.dilation)
        if self.groups < 1 or self.channels % self.groups:
            raise self.error(f"{self.channels} channels are not in {self.groups} equal group(s).")

    def _check_arrays(self) -> None:
        types = {"weights": np.int8, "bias": np.int32}
        types |= {"multiplier": np.float32, "weight_scale": np.float32}
        for field, dtype in types.items():
            array = getattr(self, field)
            if array.dtype != dtype or (field != "weights" and array.shape != (self.channels,)):
                shape = "" if field == "weights" else f" ({self.channels},)"
                raise self.error(
                    f"{field} must be {np.dtype(dtype).name}{shape}, got {array.dtype.name} "
                    f"{array.shape}."
                )
        bits, largest = self.weight_bits, np.abs(self.weights.astype(int)).max(initial=0)
        if bits not in range(2, 9) or largest > 2 ** (bits - 1) - 1:
            raise self.error(
                "weight_bits must be in 2..8 and weight codes within ±(2**(bits - 1) - 1), got "
                f"{bits!r} and a code of magnitude {largest}."
            )

    def accumulator_bound(self, source: Tensor) -> int:
        """Return the largest |acc + bias| over all codes that the source can hold."""
        lowest, highest = source.low - source.zero_point, source.high - source.zero_point
        lowest, highest = min(lowest, 0), max(highest, 0)  # Padding holds real zeros.
        weights = self.weights.astype(np.int64).reshape(-1, self.channels)
        positive, negative = np.maximum(weights, 0).sum(0), np.minimum(weights, 0).sum(0)
        bias = self.bias.astype(np.int64)
        largest = bias + positive * highest + negative * lowest
        smallest = bias + positive * lowest + negative * highest
        return int(np.maximum(np.abs(largest), np.abs(smallest)).max(initial=0))
