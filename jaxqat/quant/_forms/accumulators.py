"""Forms of int32 sums of code products: those of a layer, and those of two activations."""

import dataclasses
from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from jaxqat.quant._forms.exact import quotient, uncontracted
from jaxqat.quant._forms.forms import Codes, Operation
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._numerics.products import AnyProduct, Dot

# A bias of more accumulator units than int32 holds means that the channel is a constant, as when
# batch norm's gamma is 0.
_LARGEST_BIAS = 2.0**30

FINE = 2**8
"""Weight of codes to which terms are added that differ by place, as a position embedding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Multiplied:
    """Source of an accumulator of products; conversion finds layer, input and weights here.

    Attributes:
        path: Path of the layer.
        product: The product.
        codes: Its input.
        weight_codes: Codes of its weights.
        weight_bits: Their width.
        axes: How the product's result was transposed; None if it was not.
    """

    path: str
    product: AnyProduct
    codes: Codes
    weight_codes: Int8[Array, "..."]
    weight_bits: int
    axes: tuple[int, ...] | None = None

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes of the result that only the weights have: those of its channels."""
        own = self.product.output_axes(self.weight_codes.ndim)
        return own if self.axes is None else tuple(self.axes.index(axis) for axis in own)


@dataclasses.dataclass(frozen=True, eq=False)
class Summed:
    """Source of an accumulator of codes alone, as in average pooling.

    Attributes:
        operation: Sums the codes.
        codes: The codes.
        weight: What each of them is multiplied by: 1, or `FINE` so that a term that is added can
            be much finer than a code.
    """

    operation: Operation
    codes: Codes
    weight: int = 1


class Coefficients(NamedTuple):
    """What requantizes an accumulator: round((total + bias) * multiplier).

    Attributes:
        depends_on_total: Whether the channel depends on the total; otherwise it is the constant
            bias * multiplier.
        bias: In accumulator units, int32, without the zero points' correction.
        weight_scale: Real units per weight code.
        multiplier: (input_scale * weight_scale) / grid.scale; without a grid not divided.
    """

    depends_on_total: Bool[Array, "..."]
    bias: Int[Array, "..."]
    weight_scale: Float[Array, "..."]
    multiplier: Float[Array, "..."]


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulator:
    """input_scale * weight_scale * (total + correction) + offset, with integers in the brackets.

    Attributes:
        total: Sum of products of codes, int32.
        correction: Integer added to it: the zero points' part.
        input_scale: Real units per code of the input; a scalar.
        weight_scale: Real units per code of the weights, times later factors; broadcastable to
            total.
        offset: Bias in real units; broadcastable to total.
        source: What was summed.
    """

    total: Int[Array, "..."]
    correction: Int[Array, "..."]
    input_scale: Float[Array, ""]
    weight_scale: Float[Array, "..."]
    offset: Float[Array, "..."]
    source: Multiplied | Summed

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        """Return the tensor in units of the grid's scale, rounded to integers, not clipped."""
        return jnp.round(self._scaled(grid))

    def real(self) -> Float[Array, "..."]:
        """Return the tensor as the integer network computes it: bias in whole accumulator units."""
        return self._scaled(None)

    def _scaled(self, grid: Grid | None) -> Float[Array, "..."]:
        depends, bias, _, multiplier = self.coefficients(grid)
        total = jnp.where(depends, self.total, 0)
        correction = jnp.where(depends, self.correction, 0)
        # One conversion of one int32 sum: in float32 the order of two additions would matter
        # beyond 2**24.
        return (total + (bias + correction)).astype(jnp.float32) * multiplier

    def coefficients(self, grid: Grid | None) -> Coefficients:
        """Return what requantizes the accumulator to a grid.

        The order of these operations is that of ONNX Runtime's QLinearConv, so both have the same
        bits.
        """
        scale = self.input_scale * self.weight_scale
        depends = jnp.abs(self.offset) < jnp.abs(scale) * _LARGEST_BIAS
        bias = jnp.round(self.offset / jnp.where(depends, scale, 1.0))
        bias = jnp.where(depends, bias, 1.0).astype(jnp.int32)
        constant = quotient(self.offset, self.input_scale)
        weight_scale = jnp.where(depends, self.weight_scale, constant)
        multiplier = self.input_scale * weight_scale
        if grid is not None:
            multiplier = quotient(multiplier, grid.scale)
        return Coefficients(depends, bias, weight_scale, multiplier)

    def transposed(self, source: Multiplied, axes: tuple[int, ...]) -> Self:
        """Return the form of the transposed tensor; `source` is that of this form."""
        before = source.axes
        now = axes if before is None else tuple(before[axis] for axis in axes)
        parts = {
            name: jnp.transpose(values, axes) if values.ndim else values
            for name in ("total", "correction", "weight_scale", "offset")
            for values in (getattr(self, name),)
        }
        return dataclasses.replace(self, **parts, source=dataclasses.replace(source, axes=now))

    def finer(self) -> Self:
        """Return the form of codes alone with the weight `FINE` for each of them."""
        source = self.source
        assert isinstance(source, Summed)
        if source.weight == FINE:
            return self
        return dataclasses.replace(
            self,
            total=self.total * FINE,
            weight_scale=self.weight_scale / FINE,  # A power of two: exact.
            source=dataclasses.replace(source, weight=FINE),
        )

    def times(self, factor: Array) -> Self:
        """Return the form of the tensor multiplied by factors."""
        return dataclasses.replace(
            self,
            weight_scale=self.weight_scale * factor,
            offset=uncontracted(self.offset * factor),
        )

    def plus(self, term: Array) -> Self:
        """Return the form of the tensor with terms added."""
        return dataclasses.replace(self, offset=self.offset + term)


@dataclasses.dataclass(frozen=True, eq=False)
class Paired:
    """The product of two quantized activations over common axes, as in attention.

        round(total * m),   total = sum((q_1 - z_1) (q_2 - z_2)),   m = s_1 s_2 / s

    Attributes:
        path: Path of the product.
        dot: The product.
        left: Its left operand.
        right: Its right operand.
        total: The sums, int32.
    """

    path: str
    dot: Dot
    left: Codes
    right: Codes
    total: Int[Array, "..."]

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        """Return the tensor in units of the grid's scale, rounded to integers, not clipped."""
        return jnp.round(self.total.astype(jnp.float32) * self.multiplier(grid))

    def multiplier(self, grid: Grid | None) -> Float[Array, ""]:
        """Return what a sum is multiplied by: for units of a grid's scale, or without one, real."""
        scale = self.left.grid.scale * self.right.grid.scale
        return scale if grid is None else quotient(scale, grid.scale)
