"""The form of a function of one quantized tensor, such as swish: a table with a value per code."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jaxqat.quant._forms.accumulators import Accumulator, Summed
from jaxqat.quant._forms.exact import uncontracted
from jaxqat.quant._forms.forms import (
    Clamp,
    Codes,
    Either,
    Form,
    Joined,
    Moved,
    Operation,
    Real,
    Scaled,
    Sum,
)
from jaxqat.quant._forms.operand import Operand
from jaxqat.quant._forms.primitives import Kind, primitive_of
from jaxqat.quant._numerics import activations
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._numerics.lookup import look_up

LOWEST = -128
CODES = np.arange(LOWEST, 128, dtype=np.int8)
"""All codes, in the order of a table's entries."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tabulated:
    """A function of one quantized tensor, element by element.

    It is computed in float32 at each of the 256 codes, and an element's value is looked up. Every
    program computes the table with the same bits: no product is contracted with an addition, no
    division becomes a product, and no number is known to the compiler, whose own exponential
    differs from the device's. With coefficients by channel, such as the slopes of PReLU, there is a
    table for each channel.

    Attributes:
        codes: The quantized tensor.
        operation: The last operation of the function; None if this is the tensor itself.
        operands: What the operation reads: functions of the same tensor, and coefficients: numbers,
            or vectors of one number per channel, the last axis.
    """

    codes: Codes
    operation: Operation | None = None
    operands: "tuple[Tabulated | Array, ...]" = ()

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        """Return the tensor in units of the grid's scale, rounded to integers, not clipped."""
        return look_up(self.units(grid), self.codes.codes.astype(jnp.int32) - LOWEST)

    def units(self, grid: Grid) -> Float[Array, "256 ..."]:
        """Return the function of each code in units of the grid's scale, rounded."""
        units = jnp.round(activations.in_units(self._values(), grid))
        return jax.lax.optimization_barrier(units)

    def real(self) -> Float[Array, "..."]:
        """Return the function of each element; NaN where it has no value."""
        return look_up(self._values(), self.codes.codes.astype(jnp.int32) - LOWEST)

    def _values(self) -> Float[Array, "256 ..."]:
        """Return the function of each code, with an axis of channels if they differ."""
        numbers = list(self._numbers())
        shape = (*CODES.shape, *max((number.shape for number in numbers), key=len, default=()))
        repeated = [jnp.broadcast_to(number, shape) for number in numbers]
        known = self.codes.grid
        hidden, scale, zero = jax.lax.optimization_barrier((repeated, known.scale, known.zero))
        given = dict(zip(map(id, numbers), hidden, strict=True))
        codes = CODES.reshape(-1, *([1] * (len(shape) - 1))).astype(np.float32)
        real = jnp.broadcast_to((codes - zero) * scale, shape)
        return self._evaluate(real, given, {}).astype(jnp.float32)

    def table(self, grid: Grid) -> Int8[Array, "256 ..."]:
        """Return the code on the grid for each code of the tensor."""
        codes = self.units(grid) + grid.zero
        return jnp.clip(codes, grid.low, grid.high).astype(jnp.int8)

    def _numbers(self) -> Iterator[Array]:
        """Yield the numbers in the function, some perhaps twice."""
        for operand in self.operands:
            if isinstance(operand, Tabulated):
                yield from operand._numbers()
            else:
                yield operand

    def _evaluate(self, real: Array, given: dict[int, Array], known: dict[int, Array]) -> Array:
        """Return the function of real values."""
        if self.operation is None:
            return real
        if id(self) not in known:
            operands = [
                operand._evaluate(real, given, known)
                if isinstance(operand, Tabulated)
                else given[id(operand)]
                for operand in self.operands
            ]
            if primitive_of(self.operation.name).kind is Kind.AFFINE:
                operands = [uncontracted(x) if x.dtype == jnp.float32 else x for x in operands]
            known[id(self)] = self.operation.bind(*operands)
        return known[id(self)]


def tabled(
    operation: Operation, operands: list[Operand], shape: tuple[int, ...]
) -> Tabulated | None:
    """Return the form of a function of one quantized tensor; None if it is none.

    Args:
        operation: Computes each element of the result from those elements of its operands.
        operands: What it reads.
        shape: Shape of the result. A number can also repeat a tensor along an axis of size 1; that
            is none.
    """
    if primitive_of(operation.name).kind is Kind.CAST and _makes_real(operation):
        operation = Operation(operation.name, {}, lambda x: x.astype(jnp.float32))
    parts: list[Tabulated | Array] = []
    for operand in operands:
        part = coefficient(operand, shape) if operand.constant else as_table(operand.form)
        if part is None:
            return None
        parts.append(part)
    tensors = {id(part.codes): part.codes for part in parts if isinstance(part, Tabulated)}
    if len(tensors) != 1:
        return None
    codes = next(iter(tensors.values()))
    return Tabulated(codes, operation, tuple(parts)) if codes.codes.shape == shape else None


def _makes_real(cast: Operation) -> bool:
    return jnp.issubdtype(cast.params["new_dtype"], jnp.floating)


def as_table(form: Any) -> Tabulated | None:
    """Return a form as a function of one quantized tensor; None if it is none."""
    match form:
        case Tabulated():
            return form
        case Codes():
            return Tabulated(form)
        case Clamp():
            return _clamped(form)
        case Accumulator(source=Summed(operation=Operation(name="copy"), weight=1)):
            return _scaled(form)
    return None


def _scaled(form: Accumulator) -> Tabulated | None:
    """Return codes with factors and terms by channel as a function."""
    assert isinstance(form.source, Summed)
    codes, shape = form.source.codes, form.total.shape
    found = Tabulated(codes)
    for name, bind, values in (
        ("mul", jnp.multiply, form.weight_scale), ("add", jnp.add, form.offset)
    ):  # fmt: skip
        coefficient = _by_channel(values, shape)
        if coefficient is None:
            return None
        found = Tabulated(codes, Operation(name, {}, bind), (found, coefficient))
    return found


def _clamped(form: Clamp) -> Tabulated | None:
    found = as_table(form.inner)
    for bound, name, bind in ((form.low, "max", jnp.maximum), (form.high, "min", jnp.minimum)):
        if found is not None and bound is not None:
            found = Tabulated(found.codes, Operation(name, {}, bind), (found, jnp.float32(bound)))
    return found


def coefficient(operand: Operand, shape: tuple[int, ...]) -> Array | None:
    """Return the number that a constant is, or its numbers by channel; None if it is neither.

    Args:
        operand: What an operation reads.
        shape: Shape of the result of what reads it.
    """
    values, made = operand.values, operand.made
    if values is None or not operand.constant:
        return None
    found = _by_channel(jnp.asarray(values), shape)
    if found is None and made is not None and primitive_of(made.node.name).repeats:
        inner = made.operands()[0]
        axes = made.node.equation.params["broadcast_dimensions"]
        if inner.values is None or (np.size(inner.values) > 1 and axes[-1:] != (len(shape) - 1,)):
            return None
        return coefficient(inner, shape)
    return found


def _by_channel(values: Array, shape: tuple[int, ...]) -> Array | None:
    """Return coefficients as a number, or as one per channel of a shape; None if they are more."""
    if values.size == 1:
        found = values.reshape(())
    elif len(shape) > 1 and values.ndim and values.size == values.shape[-1] == shape[-1]:
        found = values.reshape(-1)
    else:
        return None
    if jnp.issubdtype(found.dtype, jnp.floating):
        found = found.astype(jnp.float32)
    return jax.lax.stop_gradient(found)


def real_parts(form: Form) -> Iterator[Real]:
    """Yield the real numbers that a form is computed from; only they can be NaN."""
    match form:
        case Real():
            yield form
        case Scaled():
            yield Real(form.real())
        case Tabulated():
            yield Real(form.real())
        case Either():
            yield from (*real_parts(form.form), form.real)
        case Clamp() | Moved():
            yield from real_parts(form.inner)
        case Joined():
            for part in form.parts:
                yield from real_parts(part)
        case Sum():
            yield from (*real_parts(form.left), *real_parts(form.right))
        case _:
            return
