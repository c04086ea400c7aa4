"""Which integer form an operation's result has, given the forms of what it reads."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex_core
from jaxtyping import Array

from jaxqat.quant._forms.forms import (
    Accumulator,
    Clamp,
    Codes,
    Either,
    Form,
    Joined,
    Moved,
    Operation,
    Real,
    Sum,
    Summed,
)
from jaxqat.quant._trace.program import Atom, Constant, Node, Program, inner_jaxprs


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """What an operation reads: the tensor, its form, and whether its values are the model's own.

    Attributes:
        values: The float tensor; None inside a call that is not taken apart.
        form: Its integer form, if it has one.
        constant: Whether it depends on parameters and constants only, never on the data.
        blame: The operation before it that has no integer form, for messages.
        holds: Whether the form is that of the values: where layers are switched (`Evaluator`), a
            boolean known when the program runs; else True.
    """

    values: Array | None
    form: Form | None
    constant: bool
    blame: str | None = None
    holds: Any = True

    @property
    def any_form(self) -> Form | None:
        """The form, or the float tensor as one."""
        real = None if self.values is None else Real(self.values, self.blame)
        if self.form is None or self.holds is True or real is None:
            return self.form or real
        return Either(self.holds, self.form, real)


def any_of(flags: Iterable[Any]) -> Any:
    """Whether one of the flags is set: True where that is known already, else an array."""
    flags = list(flags)
    return True if any(f is True for f in flags) else functools.reduce(jnp.logical_or, flags)


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
        total,
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


def form_of(node: Node, operands: list[Operand], results: list[Any]) -> Form | None:
    """The integer form of what a node made of its operands, or None."""
    if not jnp.issubdtype(results[0].dtype, jnp.floating):
        return None
    if node.name == "custom_jvp_call":
        return _form_inside(next(inner_jaxprs(node.equation)), operands)
    return derive(_operation(node), operands, np.shape(results[0]))


def _operation(node: Node) -> Operation:
    return Operation(node.name, node.equation.params, lambda *x: node.bind(*x)[0])


def _form_inside(jaxpr: Any, operands: list[Operand]) -> Form | None:
    """The form of a call's result, from the operations in its body (as in `jax.nn.relu`)."""
    if jaxpr.constvars or len(jaxpr.outvars) != 1:
        return None
    inner = Program(jex_core.ClosedJaxpr(jaxpr, ()))
    known = dict(zip(inner.inputs, operands, strict=True))

    def read(atom: Atom) -> Operand:
        return Operand(atom.value, None, True) if isinstance(atom, Constant) else known[atom]

    for node in inner.nodes:
        reads = [read(a) for a in node.inputs]
        constant = all(r.constant for r in reads)
        form = None
        if len(node.outputs) == 1 and jnp.issubdtype(
            inner.avals[node.outputs[0]].dtype, jnp.floating
        ):
            shape = inner.avals[node.outputs[0]].shape
            form = (
                _form_inside(next(inner_jaxprs(node.equation)), reads)
                if node.name == "custom_jvp_call"
                else derive(_operation(node), reads, shape)
            )
        known.update((number, Operand(None, form, constant)) for number in node.outputs)
    return read(inner.outputs[0]).form
