"""The integer form of a node's result, by the table of primitives."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from jaxqat.quant._forms.accumulators import Accumulator
from jaxqat.quant._forms.forms import Form, Operation, are_pixels
from jaxqat.quant._forms.operand import Operand, is_number
from jaxqat.quant._forms.primitives import Kind, Primitive, primitive_of
from jaxqat.quant._forms.tables import Tabulated, coefficient, tabled
from jaxqat.quant._trace.program import Atom, Constant, Program, TracedNode, inner_jaxprs


def form_of(node: TracedNode, operands: list[Operand], aval: Any, *, tables: bool) -> Form | None:
    """Return the integer form of what a node makes of its operands, or None.

    Args:
        node: The operation.
        operands: What it reads.
        aval: Shape and type of its result, or the result itself.
        tables: Whether functions of one quantized tensor have a form.
    """
    primitive = primitive_of(node.name)
    if primitive.kind is Kind.CALL:
        return _form_inside(next(inner_jaxprs(node.equation)), operands, tables=tables)
    if all(operand.form is None for operand in operands):
        return None
    if any(map(_is_uint8, operands)) and primitive.kind is not Kind.CAST:
        return None  # Arithmetic of uint8 wraps around.
    operation = Operation(node.name, node.equation.params, lambda *x: node.bind(*x)[0])
    if tables and _may_be_table(primitive, operands, tuple(aval.shape)):
        table = tabled(operation, operands, tuple(aval.shape))
        if table is not None:
            return table
    if primitive.form is None or not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    return primitive.form(operation, operands, tuple(aval.shape))


def _may_be_table(primitive: Primitive, operands: list[Operand], shape: tuple[int, ...]) -> bool:
    """Return whether an operation can be part of a table, and its form is not a better one."""
    if any(isinstance(operand.form, Tabulated) for operand in operands):
        return primitive.is_elementwise
    if any(are_pixels(operand.form) for operand in operands):
        # Whatever comes first of the input: in units of 1, a bias would be rounded to a pixel.
        return primitive.is_elementwise and primitive.kind is not Kind.CAST
    if primitive.joins_branches and not any(operand.constant for operand in operands):
        return False  # A residual addition of codes.
    if primitive.kind is Kind.AFFINE:
        # Factors and terms by channel are a product, which is faster than a table for each.
        found = [coefficient(operand, shape) for operand in operands]
        return not any(isinstance(operand.form, Accumulator) for operand in operands) and all(
            each is None or each.ndim == 0 for each in found
        )
    return primitive.kind in (Kind.FUNCTION, Kind.SELECT)


def _is_uint8(operand: Operand) -> bool:
    """Return whether an operand is the uint8 input itself, and not what was made real of it."""
    values = operand.values
    return are_pixels(operand.form) and values is not None and values.dtype == jnp.uint8


def _form_inside(jaxpr: Any, operands: list[Operand], *, tables: bool) -> Form | None:
    """Return the form of a call's result, from the operations in its body."""
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
        if len(node.outputs) == 1:
            form = form_of(node, reads, inner.avals[node.outputs[0]], tables=tables)
        values = _number(node, reads)
        known.update((number, Operand(values, form, constant)) for number in node.outputs)
    return read(inner.outputs[0]).form


def _number(node: TracedNode, reads: list[Operand]) -> Any:
    """Return the number that a copy, a cast or repetitions of a number are, as a ReLU's bound."""
    kind, value = primitive_of(node.name).kind, reads[0].values
    if primitive_of(node.name).repeats and is_number(value):
        return value
    if kind is Kind.CAST and is_number(value):
        return np.asarray(value).astype(node.equation.params["new_dtype"])[()]
    return value if kind is Kind.COPY else None
