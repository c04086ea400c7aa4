"""Finds dropout, which acts on codes: it stands between a quantized tensor and its readers.

With the probability p, dropout sets an element to 0, and multiplies the others by 1 / (1 - p)
(Srivastava et al. 2014, JMLR 15). Inference leaves it out. So the tensor before it is quantized, in
both modes the same one, and dropout makes codes of codes: dropped ones become the zero point, and
the scale is multiplied by 1 / (1 - p). A grid for the multiplied values would be too coarse in
inference, by one bit for p = 0.5.
"""

import dataclasses
import math
from typing import TypeGuard

import jax
import jax.numpy as jnp

from jaxqat.quant._forms.operand import is_number
from jaxqat.quant._forms.primitives import Kind, primitive_of
from jaxqat.quant._plan.dependence import is_float
from jaxqat.quant._plan.plan import CONSTANTS, DATA, Dropout
from jaxqat.quant._trace.program import Atom, Constant, Program, TracedNode


def find_dropouts(program: Program, level: list[int]) -> dict[TracedNode, Dropout]:
    """Return every dropout, by the node that selects the dropped elements and the others."""
    search = _Search(program, level)
    found = ((node, search.dropout(node)) for node in program.nodes)
    return {node: dropout for node, dropout in found if dropout is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class _Search:
    program: Program
    level: list[int]

    def dropout(self, node: TracedNode) -> Dropout | None:
        """Return the dropout that a node ends.

        It is select(mask, zeros, factor * tensor), or tensor * (mask * factor) as in Flax's
        attention.
        """
        kind = primitive_of(node.name).kind
        if kind is Kind.AFFINE and len(node.inputs) == 2:
            return self._masked(node)
        if kind is not Kind.SELECT or len(node.inputs) != 3:
            return None
        for kept, dropped in ((1, 2), (2, 1)):
            if self._number(node.inputs[dropped]) == 0:
                return self._scaled(node.inputs[kept], kept)
        return None

    def _scaled(self, kept: Atom, place: int) -> Dropout | None:
        """Return the dropout that keeps elements of `kept`, if that is a tensor times a number."""
        node = self.program.made_by.get(kept) if isinstance(kept, int) else None
        if node is None or primitive_of(node.name).kind is not Kind.AFFINE:
            return None
        numbers = [self._number(a) for a in node.inputs]
        tensors = [a for a in node.inputs if self._is_data(a)]
        if len(tensors) != 1 or numbers.count(None) != 1:
            return None

        def result(value: float) -> float:
            return _on_numbers(node, [value if n is None else n for n in numbers])

        factor = result(1.0)
        is_product = result(0.0) == 0 and 0 < factor < math.inf
        return Dropout(tensors[0], node, place, factor) if is_product else None

    def _masked(self, node: TracedNode) -> Dropout | None:
        """Return the dropout of a product with a mask of zeros and a factor above 1."""
        for place in (0, 1):
            tensor, mask = node.inputs[place], node.inputs[1 - place]
            if not self._is_data(tensor):
                continue
            factor = self._where_true(mask)
            if factor is None or not 1 < factor < math.inf:
                continue
            # Neither a sum nor a quotient.
            if _on_numbers(node, [3.0, factor]) == 3.0 * factor == _on_numbers(node, [factor, 3.0]):
                return Dropout(tensor, node, place, factor)
        return None

    def _where_true(self, atom: Atom) -> float | None:
        """Return the number where a mask is true, in a tensor that is 0 where it is false."""
        node = self.program.made_by.get(atom) if isinstance(atom, int) else None
        if node is None or not is_float(self.program.aval(node.outputs[0])):
            return None
        primitive = primitive_of(node.name)
        if primitive.kind is Kind.CAST and self.program.aval(node.inputs[0]).dtype == bool:
            return 1.0
        if primitive.kind is Kind.CAST or primitive.keeps_values:
            return self._where_true(node.inputs[0])
        if primitive.kind is not Kind.AFFINE:
            return None
        numbers = [self._number(a) for a in node.inputs]
        if numbers.count(None) != 1:
            return None
        inner = self._where_true(node.inputs[numbers.index(None)])

        def result(value: float) -> float:
            return _on_numbers(node, [value if n is None else n for n in numbers])

        return result(inner) if inner is not None and result(0.0) == 0 else None

    def _is_data(self, atom: Atom) -> TypeGuard[int]:
        if not isinstance(atom, int) or self.level[atom] != DATA:
            return False
        return is_float(self.program.avals[atom])

    def _number(self, atom: Atom) -> float | None:
        """Return the number that fills a tensor; None if the program does not fix one."""
        if isinstance(atom, Constant):
            return float(atom.value) if is_number(atom.value) and is_float(atom.aval) else None
        node = self.program.made_by.get(atom)
        if node is None or self.level[atom] > CONSTANTS or not is_float(self.program.avals[atom]):
            return None
        numbers = [self._number(a) for a in node.inputs]
        known = [n for n in numbers if n is not None]
        if not known or len(known) < len(numbers) or len(node.outputs) != 1:
            return None
        if primitive_of(node.name).is_pointwise or self.program.avals[atom].shape == ():
            return _on_numbers(node, known)
        moves = primitive_of(node.name).keeps_values
        return known[0] if moves and len(set(known)) == 1 else None


def _on_numbers(node: TracedNode, numbers: list[float]) -> float:
    """Return the result of an operation with numbers for its operands."""
    dtype = node.equation.outvars[0].aval.dtype
    with jax.ensure_compile_time_eval():
        return float(node.bind(*(jnp.asarray(n, dtype) for n in numbers))[0])
