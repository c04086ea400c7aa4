"""Forms of tensors: real values, codes, and operations on them (`accumulators` has products)."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8, UInt8

from jaxqat.quant._forms.exact import quotient, scaled, uncontracted
from jaxqat.quant._numerics import activations
from jaxqat.quant._numerics.dyadic import Dyadic, dyadic
from jaxqat.quant._numerics.grids import Grid


class Form(Protocol):
    """A tensor as an expression over integers."""

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        """Return the tensor in units of the grid's scale, rounded to integers, not clipped."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation of the trace: the primitive's name and parameters, and how to run it."""

    name: str
    params: dict[str, Any]
    bind: Callable[..., Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Real:
    """A float tensor of unknown origin; a NaN is rounded to 0 (`activations.in_units`).

    Attributes:
        values: The tensor.
        float_reason: The operation without an integer form that made it, for messages; None for
            an input.
        operand: The tensor as its readers see it, with the way it was made.
    """

    values: Float[Array, "..."]
    float_reason: str | None = None
    operand: Any = None

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        return jnp.round(activations.in_units(self.values, grid))


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """An input of the model, shifted and scaled: (values + shifts) * factors + terms.

    The network quantizes it at once. A NaN is rounded to 0. The three follow the model's own order,
    as in (x - mean) / deviation and x / 255 - mean: the difference of large numbers, which may be
    exact, must not become a difference of rounded products.

    Attributes:
        values: The input.
        shifts: float32, broadcastable to the values: what is added first.
        factors: Likewise.
        terms: Likewise: what is added last.
    """

    values: Float[Array, "..."]
    shifts: Float[Array, "..."] | None = None
    factors: Float[Array, "..."] | None = None
    terms: Float[Array, "..."] | None = None

    @property
    def coefficients(self) -> tuple[Float[Array, "..."], ...]:
        """Shifts, factors and terms."""
        parts = zip((self.shifts, self.factors, self.terms), (0, 1, 0), strict=True)
        return tuple(jnp.float32(default) if x is None else x for x, default in parts)

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        return jnp.round(activations.in_units(self.real(), grid))

    def real(self) -> Float[Array, "..."]:
        """Return the real numbers."""
        return scaled(self.values, *self.coefficients)

    def times(self, factor: Array) -> Self:
        """Return the form of the input multiplied by factors."""
        terms = None if self.terms is None else uncontracted(self.terms * factor)
        factors = factor if self.factors is None else self.factors * factor
        return dataclasses.replace(self, factors=factors, terms=terms)

    def plus(self, term: Array) -> Self:
        """Return the form of the input with terms added."""
        if self.shifts is None and self.factors is None:
            return dataclasses.replace(self, shifts=term)
        return dataclasses.replace(self, terms=term if self.terms is None else self.terms + term)


@dataclasses.dataclass(frozen=True, eq=False)
class Either:
    """A tensor that has an integer form only if the layers before it are switched on.

    Attributes:
        holds: Whether they are; a boolean known when the program runs.
        form: The form in that case.
        real: The float tensor otherwise.
    """

    holds: Bool[Array, ""]
    form: Form
    real: Real

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        return jnp.where(self.holds, self.form.in_units(grid), self.real.in_units(grid))


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A quantized tensor: scale * (code - zero_point).

    Attributes:
        codes: The codes.
        grid: Their grid.
        name: Name of the tensor (`Evaluator.codes`); empty if the codes were moved.
        moved: The operation that moved them, and the codes before it.
    """

    codes: Int8[Array, "..."]
    grid: Grid
    name: tuple[str, ...] = ()
    moved: "tuple[Operation, Codes] | None" = None

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        units = self.codes.astype(jnp.float32) - self.grid.zero
        if grid is self.grid:
            return units
        return jnp.round(units * quotient(self.grid.scale, grid.scale))


_PIXEL_GRID = Grid(np.float32(1), np.float32(1), np.int32(-128), -128, 127)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels(Codes):
    """A uint8 input of the model as codes: pixel - 128, of the scale 1 and the zero point -128.

    What the model computes of them first, such as x / 255, is a function of codes then, and the
    integer network needs no float operation for it.

    Attributes:
        images: The input.
    """

    images: UInt8[Array, "..."] | None = None

    @classmethod
    def of(cls, images: UInt8[Array, "..."]) -> "Pixels":
        """Return an input as codes."""
        codes = (images.astype(jnp.int32) + _PIXEL_GRID.low).astype(jnp.int8)
        return cls(codes, _PIXEL_GRID, images=images)


def are_pixels(form: Form | None) -> bool:
    """Return whether a form is that of a uint8 input, perhaps moved: then it has this very grid."""
    return isinstance(form, Codes) and form.grid is _PIXEL_GRID


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """A residual addition of two tensors, each quantized to a grid of its own.

    The plan quantizes both terms. The sum is rounded once, with the zero point inside the
    rounding, as in ONNX Runtime's QLinearAdd (`dyadic` has the equation).

    Attributes:
        left: The one term.
        right: The other one.
        values: The sum, if the plan did not quantize both: it is rounded then, as a real number,
            and has no integer form.
    """

    left: Form
    right: Form
    values: Float[Array, "..."] | None = None

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        if self.values is not None:
            return Real(self.values).in_units(grid)
        terms = (self.left, self.right)
        codes = [form for term in terms if (form := _codes_of(term)) is not None]
        multipliers = self.dyadic(grid, codes).multipliers
        left, right = map(partial(_multiplied, grid=grid), terms, multipliers)
        return jnp.round(left + right + grid.zero) - grid.zero

    @staticmethod
    def dyadic(grid: Grid, terms: Sequence[Codes]) -> Dyadic:
        """Return the multipliers of the terms on the grid of the sum."""
        return dyadic([quotient(term.grid.scale, grid.scale) for term in terms])


@dataclasses.dataclass(frozen=True, eq=False)
class Times:
    """The product of two quantized tensors, element by element, as of a tensor and its gate.

        round((q_1 - z_1) (q_2 - z_2) m),    m = s_1 s_2 / s

    The product of codes is below 2**16, which float32 holds exactly.
    """

    left: Codes
    right: Codes

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        units = [x.codes.astype(jnp.float32) - x.grid.zero for x in (self.left, self.right)]
        return jnp.round(units[0] * units[1] * self.multiplier(grid))

    def multiplier(self, grid: Grid) -> Float[Array, ""]:
        """Return what a product of codes is multiplied by for units of the grid's scale."""
        return quotient(self.left.grid.scale * self.right.grid.scale, grid.scale)


def are_codes(form: Form) -> bool:
    """Return whether a form is a quantized tensor, where the layers before it are on."""
    return _codes_of(form) is not None


def _codes_of(term: Form) -> Codes | None:
    term = term.form if isinstance(term, Either) else term
    return term if isinstance(term, Codes) else None


def _multiplied(term: Form, multiplier: Array, grid: Grid) -> Float[Array, "..."]:
    """Return a term of a sum in units of the sum's grid, not rounded."""
    if isinstance(term, Either):
        real = activations.in_units(term.real.values, grid)
        return jnp.where(term.holds, _multiplied(term.form, multiplier, grid), real)
    assert isinstance(term, Codes)
    return (term.codes.astype(jnp.float32) - term.grid.zero) * multiplier


@dataclasses.dataclass(frozen=True, eq=False)
class Clamp:
    """min(max(inner, low), high) in real units; rounding is monotonic, so units are clipped."""

    inner: Form
    low: float | None = None
    high: float | None = None

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        units = self.inner.in_units(grid)
        if self.low is not None:
            units = jnp.maximum(units, jnp.round(self.low * grid.inverse))
        if self.high is not None:
            units = jnp.minimum(units, jnp.round(self.high * grid.inverse))
        return units


@dataclasses.dataclass(frozen=True, eq=False)
class Moved:
    """Elements moved or picked (reshape, transpose, maximum of windows, zeros around).

    Attributes:
        inner: The tensor before that.
        operation: The operation.
        is_reshape: Whether elements have another shape in the same order; some may be repeated.
        is_largest: Whether the values decide which elements are picked, so that a factor, which may
            be negative, cannot be applied before.
    """

    inner: Form
    operation: Operation
    is_reshape: bool = False
    is_largest: bool = False

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        return self.operation.bind(self.inner.in_units(grid))


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """Tensors side by side (concatenation)."""

    parts: tuple[Form, ...]
    operation: Operation

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        return self.operation.bind(*(part.in_units(grid) for part in self.parts))
