"""The form of a function of one quantized tensor, such as swish: a table with a value per code."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

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
    Sum,
)
from jaxqat.quant._forms.operand import Operand
from jaxqat.quant._forms.primitives import Kind, primitive_of
from jaxqat.quant._numerics import activations
from jaxqat.quant._numerics.grids import Grid

LOWEST = -128
CODES = np.arange(LOWEST, 128, dtype=np.int8)
"""All codes, in the order of a table's entries."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tabulated:
    """A function of one quantized tensor, element by element.

    It is computed in float32 at each of the 256 codes, and an element's value is looked up. Every
    program computes the table with the same bits: no product is contracted with an addition, no
    division becomes a product, and no number is known to the compiler, whose own exponential
    differs from the device's.

    Attributes:
        codes: The quantized tensor.
        operation: The last operation of the function; None if this is the tensor itself.
        operands: What the operation reads: functions of the same tensor, and numbers.
    """

    codes: Codes
    operation: Operation | None = None
    operands: "tuple[Tabulated | Array, ...]" = ()

    def in_units(self, grid: Grid) -> Float[Array, "..."]:
        """Return the tensor in units of the grid's scale, rounded to integers, not clipped."""
        index = self.codes.codes.astype(jnp.int32) - LOWEST
        return jnp.take(self.units(grid), index, mode="clip")

    def units(self, grid: Grid) -> Float[Array, "256"]:
        """Return the function of each code in units of the grid's scale, rounded."""
        units = jnp.round(activations.in_units(self._values(), grid))
        return jax.lax.optimization_barrier(units)

    def real(self) -> Float[Array, "..."]:
        """Return the function of each element; NaN where it has no value."""
        index = self.codes.codes.astype(jnp.int32) - LOWEST
        return jnp.take(self._values(), index, mode="clip")

    def _values(self) -> Float[Array, "256"]:
        """Return the function of each code."""
        numbers = list(self._numbers())
        repeated = [jnp.broadcast_to(number, CODES.shape) for number in numbers]
        known = self.codes.grid
        hidden, scale, zero = jax.lax.optimization_barrier((repeated, known.scale, known.zero))
        given = dict(zip(map(id, numbers), hidden, strict=True))
        real = (CODES.astype(np.float32) - zero) * scale
        return self._evaluate(real, given, {}).astype(jnp.float32)

    def table(self, grid: Grid) -> Int8[Array, "256"]:
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


def tabled(operation: Operation, operands: list[Operand]) -> Tabulated | None:
    """Return the form of a function of one quantized tensor; None if it is none.

    Args:
        operation: Computes each element of the result from those elements of its operands.
        operands: What it reads.
    """
    if primitive_of(operation.name).kind is Kind.CAST and _makes_real(operation):
        operation = Operation(operation.name, {}, lambda x: x.astype(jnp.float32))
    parts: list[Tabulated | Array] = []
    for operand in operands:
        part = _number(operand) if operand.constant else as_table(operand.form)
        if part is None:
            return None
        parts.append(part)
    tensors = {id(part.codes): part.codes for part in parts if isinstance(part, Tabulated)}
    if len(tensors) != 1:
        return None
    return Tabulated(next(iter(tensors.values())), operation, tuple(parts))


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
    return None


def _clamped(form: Clamp) -> Tabulated | None:
    found = as_table(form.inner)
    for bound, name, bind in ((form.low, "max", jnp.maximum), (form.high, "min", jnp.minimum)):
        if found is not None and bound is not None:
            found = Tabulated(found.codes, Operation(name, {}, bind), (found, jnp.float32(bound)))
    return found


def _number(operand: Operand) -> Array | None:
    """Return the one number that a constant consists of; None if there are several."""
    values = operand.values
    if values is not None and np.size(values) == 1:
        found = jnp.reshape(jnp.asarray(values), ())
        if jnp.issubdtype(found.dtype, jnp.floating):
            found = found.astype(jnp.float32)
        return jax.lax.stop_gradient(found)
    made = operand.made
    if made is not None and primitive_of(made.node.name).repeats:
        return _number(made.operands()[0])
    return None


def real_parts(form: Form) -> Iterator[Real]:
    """Yield the real numbers that a form is computed from; only they can be NaN."""
    match form:
        case Real():
            yield form
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
