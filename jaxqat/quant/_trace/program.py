"""A traced computation as one flat list of operations, and who made and who depends on what.

JAX nests jaxprs (jit inside jit, remat). Everything the quantizer has to see, which tensor two
products share, or where a residual addition stands, crosses those borders, so calls that hold
products are inlined, and short scans with products unrolled. Calls without products are kept
whole: their own derivative rules stay.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import api_util
from jax.core import Tracer
from jax.extend import core as jex_core

PRODUCTS = frozenset({"conv_general_dilated", "dot_general"})
# Calls that mean no more than their body (jnp.pad and many others are such calls). Inlining
# `checkpoint` gives up its saving of memory, so that is done only where products are inside.
_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
# A scan with products inside is unrolled up to this length; a longer one stays in float.
MAX_TURNS = 128
_INLINED_FOR_PRODUCTS = frozenset({"checkpoint", "remat2"})


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number written into the trace."""

    value: Any

    @property
    def aval(self) -> Any:
        """Shape and type."""
        return jax.typeof(self.value)


Atom = int | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operation: reads atoms, makes variables (numbered over the whole program).

    Attributes:
        equation: What it does.
        inputs: What it reads.
        outputs: What it makes.
        scope: The module that it stands in.
        loop: The unrolled loops that it stands in, outermost first: the same in every turn.
    """

    equation: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    scope: str = ""
    loop: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        """The operation and the module that it stands in, for messages."""
        return f"'{self.name}'" + (f" in {self.scope}" if self.scope else "")

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.equation.primitive.name

    def bind(self, *operands: Any) -> list[Any]:
        """Runs the operation."""
        return bind_equation(self.equation, operands)


def bind_equation(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs one equation of a jaxpr on operands; always returns a list."""
    if next(inner_jaxprs(equation), None) is not None:
        # A call: how its functions are handed to `bind` is JAX's own affair, so JAX evaluates it.
        values = {
            v: operand
            for v, operand in zip(equation.invars, operands, strict=True)
            if not isinstance(v, jex_core.Literal)
        }
        info = api_util.debug_info("jaxqat", bind_equation, (equation, operands), {})
        info = info._replace(arg_names=("operand",) * len(values), result_paths=None)
        jaxpr = jex_core.Jaxpr(
            (), tuple(values), equation.outvars, [equation], equation.effects, info
        )
        return list(jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(jaxpr, ()))(*values.values()))
    results = equation.primitive.bind(*operands, **equation.params)
    return list(results) if equation.primitive.multiple_results else [results]


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The open jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex_core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex_core.Jaxpr):
                yield item


def products_inside(jaxpr: Any) -> int:
    """How many products a jaxpr holds, calls inside it included."""
    return sum(
        (e.primitive.name in PRODUCTS) + sum(map(products_inside, inner_jaxprs(e)))
        for e in jaxpr.eqns
    )


class Program:
    """A flat traced function.

    Attributes:
        nodes: Operations in order.
        avals: Shape and type of each variable, by number.
        inputs: Variables that receive the function's flat arguments.
        constants: Variables bound to arrays that the function closes over, and those arrays.
        outputs: The flat results.
        made_by: The node that makes a variable; inputs and constants have none.
        turns: Of a variable that is one turn's part of what a loop goes over, which turn.
        carried: What unrolled loops carry, before their first turn.
    """

    def __init__(self, closed_jaxpr: Any):
        self.nodes: list[Node] = []
        self.avals: list[Any] = []
        self.made_by: dict[int, Node] = {}
        self.constants: dict[int, Any] = {}
        self.turns: dict[int, int] = {}
        self.carried: set[int] = set()
        self.inputs = tuple(self._variable(v.aval) for v in closed_jaxpr.jaxpr.invars)
        self.outputs = self._inline(closed_jaxpr.jaxpr, closed_jaxpr.consts, self.inputs)

    def aval(self, atom: Atom) -> Any:
        """Shape and type of what an operation reads."""
        return atom.aval if isinstance(atom, Constant) else self.avals[atom]

    def _variable(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _constant(self, value: Any) -> Atom:
        if np.ndim(value) == 0 and not isinstance(value, Tracer):
            return Constant(value)
        number = self._variable(jax.typeof(value))
        self.constants[number] = value
        return number

    def _inline(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        inputs: Sequence[Atom],
        scope: str = "",
        loop: tuple[int, ...] = (),
    ) -> list[Atom]:
        known: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        known.update((v, self._constant(c)) for v, c in zip(jaxpr.constvars, consts, strict=True))

        def atom(v: Any) -> Atom:
            return Constant(v.val) if isinstance(v, jex_core.Literal) else known[v]

        for equation in jaxpr.eqns:
            operands = tuple(atom(v) for v in equation.invars)
            inner = list(inner_jaxprs(equation))
            name = equation.primitive.name
            here = "/".join(part for part in (scope, str(equation.source_info.name_stack)) if part)
            if name in _INLINED or (name in _INLINED_FOR_PRODUCTS and products_inside(inner[0])):
                body = next(p for p in equation.params.values() if _is_jaxpr(p))
                closed = getattr(body, "consts", ())
                results = self._inline(inner[0], closed, operands, here, loop)
            elif name == "scan" and _is_unrolled(equation):
                results = self._unroll(equation, operands, here, (*loop, id(equation)))
            elif name == "convert_element_type" and isinstance(operands[0], Constant):
                dtype = equation.params["new_dtype"]
                results = [Constant(np.asarray(operands[0].value).astype(dtype)[()])]
            else:
                results = [self._variable(v.aval) for v in equation.outvars]
                node = Node(equation, operands, tuple(results), here, loop)
                self.nodes.append(node)
                self.made_by.update((number, node) for number in results)
            known.update(zip(equation.outvars, results, strict=True))
        return [atom(v) for v in jaxpr.outvars]

    def _unroll(
        self, equation: Any, operands: tuple[Atom, ...], scope: str, loop: tuple[int, ...]
    ) -> list[Atom]:
        """The turns of a scan one after the other: its results, carried and stacked."""
        params = equation.params
        body, constants, carried = params["jaxpr"], params["num_consts"], params["num_carry"]
        shared, carry = operands[:constants], list(operands[constants : constants + carried])
        over = operands[constants + carried :]
        start = jax.make_jaxpr(lambda *xs: [jnp.copy(x) for x in xs])(*map(self.aval, carry))
        carry = self._inline(start.jaxpr, start.consts, carry, scope)
        self.carried.update(a for a in carry if isinstance(a, int))
        avals = [self.aval(a) for a in over]
        made: dict[int, list[Atom]] = {}
        turns = range(params["length"])
        for turn in reversed(turns) if params["reverse"] else turns:
            take = jax.make_jaxpr(lambda *xs, turn=turn: [x[turn] for x in xs])(*avals)
            parts = self._inline(take.jaxpr, take.consts, over, scope)
            self.turns.update((a, turn) for a in parts if isinstance(a, int))
            results = self._inline(body.jaxpr, body.consts, (*shared, *carry, *parts), scope, loop)
            carry, made[turn] = results[:carried], results[carried:]
        stacked = []
        for column in zip(*(made[turn] for turn in turns), strict=True):
            join = jax.make_jaxpr(lambda *xs: jnp.stack(xs))(*(self.aval(a) for a in column))
            stacked += self._inline(join.jaxpr, join.consts, column, scope)
        return [*carry, *stacked]


def _is_unrolled(equation: Any) -> bool:
    """Whether a scan is taken apart: it holds products, and is short."""
    inner = next(inner_jaxprs(equation))
    return 0 < equation.params["length"] <= MAX_TURNS and products_inside(inner) > 0


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (jex_core.ClosedJaxpr, jex_core.Jaxpr))


def trace(function: Callable, arguments: Sequence[Any]) -> tuple[Program, Any]:
    """Traces a function of flat array arguments.

    Returns:
        The program, and the tree structure of the function's result.
    """
    closed_jaxpr, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return Program(closed_jaxpr), jax.tree.structure(result)
