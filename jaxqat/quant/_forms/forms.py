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
from jaxtyping import Array, Bool, Float, Int, Int8

from jaxqat.quant._numerics import activations
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._numerics.products import Product

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
        return jnp.round(activations.in_steps(self.values, grid))


@dataclasses.dataclass(frozen=True, eq=False)
class Either:
    """A tensor that follows from integers only if the layers behind it are switched on.

    Attributes:
        holds: Whether it does; a boolean that is known when the program runs.
        form: How it then follows.
        real: What it is otherwise.
    """

    holds: Bool[Array, ""]
    form: Form
    real: Real

    def steps(self, grid: Grid) -> Float[Array, "..."]:
        return jnp.where(self.holds, self.form.steps(grid), self.real.steps(grid))


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
        return jnp.round(steps * quotient(self.grid.scale, grid.scale))


@dataclasses.dataclass(frozen=True, eq=False)
class Multiplied:
    """An accumulator of products: where conversion finds its layer, input and weights."""

    path: str
    product: Product
    codes: Codes
    weight_codes: Int8[Array, "..."]
    weight_bits: int


@dataclasses.dataclass(frozen=True, eq=False)
class Summed:
    """An accumulator of codes alone, as average pooling has it."""

    operation: Operation
    codes: Codes


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulator:
    """input_scale * weight_scale * (total + correction) + offset, with integers in the brackets.

    Attributes:
        total: Sum of products of codes, int32.
        correction: Integer added to it (the zero points' part).
        input_scale: Real units per code of the input; a scalar.
        weight_scale: Real units per code of the weights, factors behind the product included;
            broadcastable to total.
        offset: Bias in real units; broadcastable to total.
        source: What was summed.
    """

    total: Int[Array, "..."]
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
        total = jnp.where(alive, self.total, 0)
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
        weight_scale = jnp.where(alive, self.weight_scale, quotient(self.offset, self.input_scale))
        multiplier = self.input_scale * weight_scale
        if grid is not None:
            multiplier = quotient(multiplier, grid.scale)
        return alive, bias, weight_scale, multiplier

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


def quotient(values: Float[Array, "..."], divisor: Float[Array, ""]) -> Float[Array, "..."]:
    """Values / divisor, correctly rounded in every program.

    XLA makes a division by one broadcast number a product with its reciprocal where it likes to,
    which differs in the last bit for two channels in five; it cannot see through the barrier.
    """
    return values / jax.lax.optimization_barrier(jnp.broadcast_to(divisor, jnp.shape(values)))


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
        if isinstance(form, Either):
            terms = (Sum._term(f, grid) for f in (form.form, form.real))
            return jnp.where(form.holds, *terms)
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
