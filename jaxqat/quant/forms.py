"""Integer forms: how a tensor follows from integers, so that it can be requantized exactly.

The evaluator computes every tensor in floating point, as the model wrote it, and beside it, where
it can, a form: the tensor as an expression over codes and accumulators. Quantizing a tensor asks
its form for the rounded value in units of the output's scale s,

    product, affine chain behind it:     round((acc + b) * m), b = round(offset / scale) - z sum(k)
    a tensor that is codes already:      round((code - z) * m)
    a residual addition:                 the sum of its terms, each on an int8 grid by itself
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
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Int8

from jaxqat.quant import ops
from jaxqat.quant.products import Product
from jaxqat.quant.ranges import Grid

# A bias of more accumulator units than int32 holds means that the channel is a constant, as when
# batch norm's gamma is 0.
_LARGEST_BIAS = 2.0**30


class Form(Protocol):
    """A tensor as an expression over integers."""

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        """The tensor in units of the grid's scale, rounded to integers, not yet clipped."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation of the trace: the primitive's name and parameters, and how to run it."""

    name: str
    params: dict[str, Any]
    bind: Callable[..., Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Real:
    """A float tensor of which nothing more is known.

    Attributes:
        values: The tensor.
        blame: The operation that has no integer form, for messages; None for an input.
    """

    values: Float[Array, "..."]
    blame: str | None = None

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return jnp.round(ops.in_steps(self.values, grid))


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A quantized tensor: scale * (code - zero_point).

    Attributes:
        codes: The codes.
        grid: Their grid.
        key: Key of the tensor; empty if the codes were moved.
        moved: The operation that moved them, and from where.
    """

    codes: Int8[Array, "..."]
    grid: Grid
    key: tuple[str, ...] = ()
    moved: "tuple[Operation, Codes] | None" = None

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        steps = self.codes.astype(jnp.float32) - self.grid.zero
        if grid is self.grid:
            return steps
        return jnp.round(steps * (self.grid.scale / grid.scale))


@dataclasses.dataclass(frozen=True, eq=False)
class Multiplied:
    """An accumulator of products: where conversion finds its layer, input and weights."""

    path: str
    product: Product
    codes: Codes
    weight_codes: Int8[Array, "..."]


@dataclasses.dataclass(frozen=True, eq=False)
class Summed:
    """An accumulator of codes alone, as average pooling has it."""

    operation: Operation
    codes: Codes


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulator:
    """input_scale * weight_scale * (total + correction) + offset, with integers in the brackets.

    Attributes:
        total: Sum of products of codes, an integer, as float32.
        correction: Integer added to it (the zero points' part).
        input_scale: Real units per code of the input; a scalar.
        weight_scale: Real units per code of the weights, factors behind the product included;
            broadcastable to total.
        offset: Bias in real units; broadcastable to total.
        source: What was summed.
    """

    total: Float[Array, "..."]
    correction: Int[Array, "..."]
    input_scale: Float[Array, ""]
    weight_scale: Float[Array, "..."]
    offset: Float[Array, "..."]
    source: Multiplied | Summed

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return jnp.round(self._scaled(grid))

    def real(self) -> Float[Array, "..."]:
        """The tensor as the integer network gives it: the bias in whole accumulator units."""
        return self._scaled(None)

    def _scaled(self, grid: Grid | None) -> Float[Array, "..."]:
        alive, bias, _, multiplier = self.coefficients(grid)
        total = jnp.where(alive, self.total, 0.0).astype(jnp.int32)
        correction = jnp.where(alive, self.correction, 0)
        # One conversion of one int32 sum: in float32 the order of two additions would matter
        # beyond 2**24.
        return (total + (bias + correction)).astype(jnp.float32) * multiplier

    def coefficients(self, grid: Grid | None) -> tuple[Array, Array, Array, Array]:
        """What the requantization of the accumulator to a grid is made of.

        Returns:
            Whether the channel depends on the total at all (else it is the constant bias *
            multiplier); the bias in accumulator units, int32; the weight scale; the multiplier
            (input_scale * weight_scale) / grid.scale, undivided without a grid. The order of
            these operations is ONNX Runtime's, whose QLinearConv then has the same bits.
        """
        scale = self.input_scale * self.weight_scale
        alive = jnp.abs(self.offset) < jnp.abs(scale) * _LARGEST_BIAS
        bias = jnp.round(self.offset / jnp.where(alive, scale, 1.0))
        bias = jnp.where(alive, bias, 1.0).astype(jnp.int32)
        weight_scale = jnp.where(alive, self.weight_scale, self.offset / self.input_scale)
        multiplier = self.input_scale * weight_scale
        return alive, bias, weight_scale, multiplier if grid is None else multiplier / grid.scale

    def times(self, factor: Array) -> Self:
        """The form of the tensor multiplied by per-channel factors."""
        return dataclasses.replace(
            self,
            weight_scale=self.weight_scale * factor,
            offset=uncontracted(self.offset * factor),
        )

    def plus(self, term: Array) -> Self:
        """The form of the tensor with per-channel terms added."""
        return dataclasses.replace(self, offset=self.offset + term)


def uncontracted(product: Float[Array, "..."]) -> Float[Array, "..."]:
    """A product that no compiler fuses with an addition behind it into one multiply-add.

    Contracted or not, the last bit differs, and with it the rounded bias of one channel in a
    thousand; training and conversion are different programs, so that it must not depend on what
    the compiler sees. The bounds change infinities only, and stand in the way.
    """
    largest = np.finfo(np.float32).max
    return jnp.clip(product, -largest, largest)


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """A residual addition.

    What is codes already is requantized to the output's grid. Any other term is first an int8
    tensor on a grid of its own (`Grid.branch`): so it is in deployment, where a convolution writes
    int8, and in ONNX Runtime, whose convolutions are integer only if they do.
    """

    left: Form
    right: Form

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return self._term(self.left, grid) + self._term(self.right, grid)

    @staticmethod
    def _term(form: Form, grid: Grid) -> Float[Array, "..."]:
        if isinstance(form, Codes):
            return form.steps(grid)
        branch = grid.branch
        return jnp.clip(form.steps(branch), branch.low, branch.high) * grid.branch_steps


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
    operation: Operation

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return self.bind(self.inner.steps(grid))

    def bind(self, steps: Float[Array, "..."]) -> Float[Array, "..."]:
        """The operation on integers; padding is with zeros."""
        fill = (jnp.float32(0),) if self.operation.name == "pad" else ()
        return self.operation.bind(steps, *fill)


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """Tensors side by side (concatenation)."""

    parts: tuple[Form, ...]
    operation: Operation

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return self.operation.bind(*(part.steps(grid) for part in self.parts))


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """What an operation reads: the tensor, its form, and whether its values are the model's own.

    Attributes:
        values: The float tensor; None inside a call that is not taken apart.
        form: Its integer form, if it has one.
        constant: Whether it depends on parameters and constants only, never on the data.
        blame: The operation before it that has no integer form, for messages.
    """

    values: Array | None
    form: Form | None
    constant: bool
    blame: str | None = None

    @property
    def any_form(self) -> Form | None:
        """The form, or the float tensor as one."""
        return self.form or (None if self.values is None else Real(self.values, self.blame))


def is_channelwise(shape: tuple[int, ...], output_shape: tuple[int, ...]) -> bool:
    """Whether coefficients of this shape are one per channel, or one in all, of an output."""
    if not shape:
        return True
    return len(shape) == len(output_shape) and sum(n != 1 for n in shape) <= 1


def derive(operation: Operation, operands: list[Operand], shape) -> Form | None:
    """The form of an operation's result, or None.

    Args:
        operation: Which.
        operands: What it reads.
        shape: Shape of its result.
    """
    name = operation.name
    if all(operand.form is None for operand in operands):
        return None
    if name in MOVES:
        return _moved(operation, operands)
    if name == "pad":
        return _padded(operation, operands)
    if name == "concatenate":
        parts = tuple(form for operand in operands if (form := operand.any_form) is not None)
        return Joined(parts, operation) if len(parts) == len(operands) else None
    if name in ("reduce_sum", "reduce_window_sum"):
        return _summed(operation, operands[0].form)
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


def _moved(operation: Operation, operands: list[Operand]) -> Form | None:
    form = operands[0].form
    if operation.name in _SAME_VALUES or form is None:
        return form
    if isinstance(form, Codes):
        return Codes(operation.bind(form.codes), form.grid, moved=(operation, form))
    return Moved(form, operation)


def _padded(operation: Operation, operands: list[Operand]) -> Form | None:
    form, fill = operands[0].form, operands[1].values
    if form is None or not operands[1].constant or not is_number(fill, 0.0):
        return None
    if isinstance(form, Codes):
        codes = operation.bind(form.codes, form.grid.zero.astype(jnp.int8))
        return Codes(codes, form.grid, moved=(operation, form))
    return Moved(form, operation)


def _summed(operation: Operation, form: Form | None) -> Form | None:
    if not isinstance(form, Codes):
        return None
    total = operation.bind(form.codes.astype(jnp.int32) - form.grid.zero.astype(jnp.int32))
    return Accumulator(
        total.astype(jnp.float32),
        jnp.int32(0),
        form.grid.scale,
        jnp.float32(1),
        jnp.float32(0),
        Summed(operation, form),
    )


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
