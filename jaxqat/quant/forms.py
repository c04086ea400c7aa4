"""Integer forms: how a tensor follows from integers, so that it can be requantized exactly.

The evaluator computes every tensor in floating point, as the model wrote it, and beside it, where
it can, a form: the tensor as an expression over codes and accumulators. Quantizing a tensor asks
its form for the rounded value in units of the output's scale s,

    product, affine chain behind it:     round((acc + b) * m), b = round(offset / scale) - z sum(k)
    a tensor that is codes already:      round((code - z) * m)
    a residual addition:                 the sum of its terms, each rounded by itself
    ReLU, clipping, pooling, reshaping:  the same operation on the rounded values

with m the ratio of the form's scale to s: the requantization of Jacob et al. 2018
(arXiv:1712.05877, section 2.2), with the bias added to the accumulator before the one
multiplication, which is the only order in which no compiler changes a bit by contracting a
multiply-add. It is the arithmetic of the deployed network, so training that runs it is trained on
what will be served. Batch norm with batch statistics has no such form (its coefficients depend on
the batch); there the float value is rounded, and the additions still as above.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int8

from jaxqat.quant import ops
from jaxqat.quant.ranges import Grid

# A bias of more accumulator units than int32 holds means that the channel is a constant, as when
# batch norm's gamma is 0. (Beyond 2**24 units, sums are exact to a float32's 24 bits only.)
_LARGEST_BIAS = 2.0**30


class Form(Protocol):
    """A tensor as an expression over integers."""

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        """The tensor in units of the grid's scale, rounded to integers, not yet clipped."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Real:
    """A float tensor of which nothing more is known."""

    values: Float[Array, "..."]

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return jnp.round(ops.in_steps(self.values, grid))


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A quantized tensor: scale * (code - zero_point)."""

    codes: Int8[Array, "..."]
    grid: Grid

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        steps = self.codes.astype(jnp.float32) - self.grid.zero
        if grid is self.grid:
            return steps
        return jnp.round(steps * (self.grid.scale * grid.inverse))


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulator:
    """scale * (total + correction) + offset, with total and correction integers.

    Attributes:
        total: Sum of products of codes, as float32.
        correction: Integer added to it (the zero points' part), as float32.
        scale: Real units per unit of total; broadcastable to it.
        offset: Bias in real units; broadcastable to total.
    """

    total: Float[Array, "..."]
    correction: Float[Array, "..."]
    scale: Float[Array, "..."]
    offset: Float[Array, "..."]

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        total, bias, multiplier = self.coefficients(grid)
        return jnp.round((total + bias) * multiplier)

    def coefficients(self, grid: Grid) -> tuple[Array, Array, Array]:
        """total, b and m of round((total + b) * m); total is 0 where the channel is constant."""
        scale = jnp.asarray(self.scale)
        alive = jnp.abs(self.offset) < jnp.abs(scale) * _LARGEST_BIAS
        bias = jnp.round(self.offset / jnp.where(alive, scale, 1.0)) + self.correction
        bias = jnp.where(alive, bias, 1.0)
        multiplier = jnp.where(alive, scale, self.offset) * grid.inverse
        return jnp.where(alive, self.total, 0.0), bias, multiplier

    def times(self, factor: Array) -> Self:
        """The form of the tensor multiplied by per-channel factors."""
        return dataclasses.replace(self, scale=self.scale * factor, offset=self.offset * factor)

    def plus(self, term: Array) -> Self:
        """The form of the tensor with per-channel terms added."""
        return dataclasses.replace(self, offset=self.offset + term)


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """A residual addition."""

    left: Form
    right: Form

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return self.left.steps(grid) + self.right.steps(grid)


@dataclasses.dataclass(frozen=True, eq=False)
class Clamp:
    """min(max(inner, low), high) in real units; rounding is monotonic, so it clips steps."""

    inner: Form
    low: float | None = None
    high: float | None = None

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        steps = self.inner.steps(grid)
        if self.low is not None:
            steps = jnp.maximum(steps, jnp.round(self.low * grid.inverse))
        if self.high is not None:
            steps = jnp.minimum(steps, jnp.round(self.high * grid.inverse))
        return steps


@dataclasses.dataclass(frozen=True, eq=False)
class Moved:
    """Elements moved or picked (reshape, transpose, maximum of windows): works on steps."""

    inner: Form
    move: Callable[[Array], Array]

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return self.move(self.inner.steps(grid))


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """Tensors side by side (concatenation)."""

    parts: tuple[Form, ...]
    join: Callable[..., Array]

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return self.join(*(part.steps(grid) for part in self.parts))


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """What an operation reads: the tensor, its form, and whether its values are the model's own.

    Attributes:
        values: The float tensor; None inside a call that is not taken apart.
        form: Its integer form, if it has one.
        constant: Whether it depends on parameters and constants only, never on the data.
    """

    values: Array | None
    form: Form | None
    constant: bool

    @property
    def any_form(self) -> Form | None:
        """The form, or the float tensor as one."""
        return self.form or (None if self.values is None else Real(self.values))


def is_channelwise(shape: tuple[int, ...], output_shape: tuple[int, ...]) -> bool:
    """Whether coefficients of this shape are one per channel, or one in all, of an output."""
    if not shape:
        return True
    return len(shape) == len(output_shape) and sum(n != 1 for n in shape) <= 1


def derive(name: str, bind: Callable, operands: list[Operand], shape) -> Form | None:
    """The form of an operation's result, or None.

    Args:
        name: Name of the primitive.
        bind: The primitive with its parameters, as a function of its operands.
        operands: What it reads.
        shape: Shape of its result.
    """
    if all(operand.form is None for operand in operands):
        return None
    if name in MOVES:
        return _moved(name, bind, operands)
    if name == "pad":
        return _padded(bind, operands)
    if name == "concatenate":
        parts = tuple(form for operand in operands if (form := operand.any_form) is not None)
        return Joined(parts, bind) if len(parts) == len(operands) else None
    if name in ("reduce_sum", "reduce_window_sum"):
        return _summed(bind, operands[0].form)
    if name in ("max", "min"):
        return _clamped(name, operands)
    if name == "neg" and isinstance(operands[0].form, Accumulator):
        return operands[0].form.times(jnp.float32(-1))
    if name in ("add", "sub", "mul", "div"):
        return _affine(name, operands, shape) or _added(name, operands)
    return None


_SAME_VALUES = frozenset({"convert_element_type", "copy", "optimization_barrier"})
MOVES = _SAME_VALUES | {
    "broadcast_in_dim",
    "expand_dims",
    "reduce_window_max",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "transpose",
}


def _moved(name: str, bind: Callable, operands: list[Operand]) -> Form | None:
    form = operands[0].form
    if name in _SAME_VALUES or form is None:
        return form
    if isinstance(form, Codes):
        return Codes(bind(form.codes), form.grid)
    return Moved(form, bind)


def _padded(bind: Callable, operands: list[Operand]) -> Form | None:
    form, fill = operands[0].form, operands[1].values
    if form is None or not operands[1].constant or not is_number(fill, 0.0):
        return None
    if isinstance(form, Codes):
        return Codes(bind(form.codes, form.grid.zero.astype(jnp.int8)), form.grid)
    return Moved(form, lambda steps: bind(steps, jnp.float32(0)))


def _summed(bind: Callable, form: Form | None) -> Form | None:
    if not isinstance(form, Codes):
        return None
    total = bind(form.codes.astype(jnp.int32) - form.grid.zero.astype(jnp.int32))
    zero = jnp.float32(0)
    return Accumulator(total.astype(jnp.float32), zero, form.grid.scale, zero)


def _clamped(name: str, operands: list[Operand]) -> Form | None:
    for operand, bound in (operands, operands[::-1]):
        if operand.form is not None and bound.constant and is_number(bound.values):
            value = float(bound.values)  # pyright: ignore[reportArgumentType]
            return Clamp(operand.form, **{"low" if name == "max" else "high": value})
    return None


def _affine(name: str, operands: list[Operand], shape) -> Form | None:
    for side, (operand, other) in enumerate((operands, operands[::-1])):
        form, values = operand.form, other.values
        if not isinstance(form, Accumulator) or not other.constant or values is None:
            continue
        if form.total.shape != tuple(shape) or not is_channelwise(jnp.shape(values), shape):
            continue
        factor = jax.lax.stop_gradient(jnp.asarray(values, jnp.float32))
        if name == "mul":
            return form.times(factor)
        if name == "add":
            return form.plus(factor)
        if name == "sub":
            return form.plus(-factor) if side == 0 else form.times(jnp.float32(-1)).plus(factor)
        if name == "div" and side == 0:
            return form.times(1.0 / factor)
    return None


def _added(name: str, operands: list[Operand]) -> Form | None:
    left, right = (operand.any_form for operand in operands)
    if name != "add" or left is None or right is None or any(o.constant for o in operands):
        return None
    return Sum(left, right)


def is_number(values, equal_to: float | None = None) -> bool:
    """Whether this is a number known while tracing (and the given one)."""
    if values is None or isinstance(values, Tracer) or jnp.ndim(values) != 0:
        return False
    return equal_to is None or float(values) == equal_to
