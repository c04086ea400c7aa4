"""Forms of tensors: real values, codes, and operations on them (`accumulators` has products)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8

from jaxqat.quant._forms.exact import quotient
from jaxqat.quant._numerics import activations
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
    """A float tensor of unknown origin.

    Attributes:
        values: The tensor.
        float_reason: The operation without an integer form that made it, for messages; None for
            an input.
    """

    values: Float[Array, "..."]
    float_reason: str | None = None

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        return jnp.round(activations.in_units(self.values, grid))


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
        key: Key of the tensor; empty if the codes were moved.
        moved: The operation that moved them, and the codes before it.
    """

    codes: Int8[Array, "..."]
    grid: Grid
    key: tuple[str, ...] = ()
    moved: "tuple[Operation, Codes] | None" = None

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        units = self.codes.astype(jnp.float32) - self.grid.zero
        if grid is self.grid:
            return units
        return jnp.round(units * quotient(self.grid.scale, grid.scale))


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """A residual addition.

    A term that is codes already is requantized to the output's grid. Any other term first becomes
    an int8 tensor on a grid of its own (`Grid.branch`), as in deployment: a convolution writes
    int8 there, and ONNX Runtime's convolutions are integer only if they do.
    """

    left: Form
    right: Form

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        return self._term(self.left, grid) + self._term(self.right, grid)

    @staticmethod
    def _term(form: Form, grid: Grid) -> Float[Array, "..."]:
        if isinstance(form, Either):
            terms = (Sum._term(f, grid) for f in (form.form, form.real))
            return jnp.where(form.holds, *terms)
        if isinstance(form, Codes):
            return form.in_units(grid)
        branch = grid.branch
        return jnp.clip(form.in_units(branch), branch.low, branch.high) * grid.branch_units


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
    """Elements moved or picked (reshape, transpose, maximum of windows, zeros around)."""

    inner: Form
    operation: Operation

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        return self.operation.bind(self.inner.in_units(grid))


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """Tensors side by side (concatenation)."""

    parts: tuple[Form, ...]
    operation: Operation

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        return self.operation.bind(*(part.in_units(grid) for part in self.parts))
