"""The integer form of a node's result, by the table of primitives."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from jaxqat.quant._forms.forms import Form, Operation
from jaxqat.quant._forms.operand import Operand, is_number
from jaxqat.quant._forms.primitives import Kind, primitive_of
from jaxqat.quant._trace.program import Atom, Constant, Node, Program, inner_jaxprs


def form_of(node: Node, operands: list[Operand], aval: Any) -> Form | None:
    """Return the integer form of what a node makes of its operands, or None.

    Args:
        node: The operation.
        operands: What it reads.
        aval: Shape and type of its result, or the result itself.
    """
    primitive = primitive_of(node.name)
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    if primitive.kind is Kind.CALL:
        return _form_inside(next(inner_jaxprs(node.equation)), operands)
    if primitive.form is None or all(operand.form is None for operand in operands):
        return None
    operation = Operation(node.name, node.equation.params, lambda *x: node.bind(*x)[0])
    return primitive.form(operation, operands, tuple(aval.shape))


def _form_inside(jaxpr: Any, operands: list[Operand]) -> Form | None:
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
            form = form_of(node, reads, inner.avals[node.outputs[0]])
        values = _number(node, reads)
        known.update((number, Operand(values, form, constant)) for number in node.outputs)
    return read(inner.outputs[0]).form


def _number(node: Node, reads: list[Operand]) -> Any:
    """Return the number that a copy or a cast of a number is, such as the bound of a ReLU."""
    kind, value = primitive_of(node.name).kind, reads[0].values
    if kind is Kind.CAST and is_number(value):
        return np.asarray(value).astype(node.equation.params["new_dtype"])[()]
    return value if kind is Kind.COPY else None
