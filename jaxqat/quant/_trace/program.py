"""A traced computation as one flat list of operations.

JAX nests jaxprs (jit inside jit, remat). The quantizer has to see across those borders which
tensor two products share, or where a residual addition is. So calls that hold products are
inlined, and short scans with products are unrolled. Other calls stay whole, and keep their own
derivative rules.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import api_util, lax
from jax.core import Tracer
from jax.extend import core as jex_core

PRODUCTS = frozenset({"conv_general_dilated", "dot_general"})
# Calls that mean no more than their body (`jnp.pad` is one). Inlining `checkpoint` gives up its
# saving of memory, so only those with products inside are inlined.
INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
INLINED_FOR_PRODUCTS = frozenset({"checkpoint", "remat2"})
# What may stand between a maximum and its subtraction in a softmax.
_KEEPING_MAXIMA = frozenset({"max", "broadcast_in_dim", "reshape", "stop_gradient"})
# A scan with products inside is unrolled up to this length; a longer one stays in float.
MAX_ITERATIONS = 128


def _split(x: Any, *, sizes: Sequence[int], axis: int) -> list[Any]:
    ends = list(itertools.accumulate(sizes))
    bounds = zip((0, *ends), ends, strict=False)
    return [lax.slice_in_dim(x, start, end, axis=axis) for start, end in bounds]


def _unstack(x: Any, *, axis: int) -> list[Any]:
    return [lax.squeeze(part, (axis,)) for part in _split(x, sizes=(1,) * x.shape[axis], axis=axis)]


def _stack(*parts: Any, axis: int) -> Any:
    return lax.concatenate([lax.expand_dims(part, (axis,)) for part in parts], axis)


def _tile(x: Any, *, reps: Sequence[int]) -> Any:
    for axis, times in enumerate(reps):
        if times == 1:
            continue
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        axes = [i + (i >= axis) for i in range(x.ndim)]  # A new axis before this one.
        tiles = lax.broadcast_in_dim(x, (*before, times, *x.shape[axis:]), axes)
        x = lax.reshape(tiles, (*before, times * x.shape[axis], *after))
    return x


# Operations that are seen as the simpler ones that they consist of.
_AS_OTHERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"split": _split, "stack": _stack, "unstack": _unstack, "tile": _tile}
)


def as_others(equation: Any) -> Any:
    """Return the jaxpr of the simpler operations that an operation consists of; None if of none."""
    same = _AS_OTHERS.get(equation.primitive.name)
    if same is None:
        return None
    return jax.make_jaxpr(functools.partial(same, **equation.params))(
        *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars)
    )


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number in the trace."""

    value: Any

    @property
    def aval(self) -> Any:
        """Its shape and type."""
        return jax.typeof(self.value)


Atom = int | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class TracedNode:
    """One operation: it reads atoms and makes variables, which are numbered over the program.

    Attributes:
        equation: The jaxpr equation.
        inputs: The atoms that it reads.
        outputs: The variables that it makes.
        scope: The module that it belongs to.
        loop: The unrolled loops around it, outermost first; the same in every iteration.
    """

    equation: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    scope: str = ""
    loop: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """The scope without the names that `jnp.einsum` gives its products."""
        return "/".join(part for part in self.scope.split("/") if "->" not in part)

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.equation.primitive.name

    @property
    def label(self) -> str:
        """What messages call the operation: its primitive, or its function if that has derivatives.

        `jax.nn.relu` is one: its primitive is 'custom_jvp_call'.
        """
        if not self.name.startswith("custom_"):
            return self.name
        bodies = inner_jaxprs(self.equation)
        return next((body.debug_info.func_name for body in bodies), self.name)

    def bind(self, *operands: Any) -> list[Any]:
        """Run the operation."""
        return bind_equation(self.equation, operands)


def bind_equation(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Run one equation of a jaxpr on operands; always return a list."""
    if next(inner_jaxprs(equation), None) is not None:
        # A call: how `bind` takes its functions is internal to JAX, so JAX evaluates it.
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
    """Yield the open jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex_core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex_core.Jaxpr):
                yield item


def products_inside(jaxpr: Any) -> int:
    """Return how many products a jaxpr holds, with those in calls inside it."""
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
        constants: Arrays that the function closes over, by variable.
        outputs: The flat results.
        made_by: The node that makes a variable; inputs and constants have none.
        iterations: Iteration of an unrolled loop, by the variable that is its slice of the
            arrays that the loop scans over.
        carried: Variables that unrolled loops carry, before their first iteration.
    """

    def __init__(self, closed_jaxpr: Any):
        self.nodes: list[TracedNode] = []
        self.avals: list[Any] = []
        self.made_by: dict[int, TracedNode] = {}
        self.constants: dict[int, Any] = {}
        self.iterations: dict[int, int] = {}
        self.carried: set[int] = set()
        self.inputs = tuple(self._variable(v.aval) for v in closed_jaxpr.jaxpr.invars)
        self.outputs = self._inline(closed_jaxpr.jaxpr, closed_jaxpr.consts, self.inputs)

    def where(self, node: TracedNode) -> str:
        """Return the operation and its module, for messages; name softmax and norms as a whole."""
        if node.scope in self._normalizations:
            return f"the normalization {node.scope}"
        what = "a softmax" if self._starts_softmax(node) else f"'{node.label}'"
        return what + (f" in {node.scope}" if node.scope else "")

    def _starts_softmax(self, node: TracedNode) -> bool:
        """Return whether a node is the maximum in exp(x - max(x)), which keeps a softmax finite."""
        if node.name != "reduce_max":
            return False
        waiting = [node.outputs[0]]
        while waiting:
            number = waiting.pop()
            for reader in (n for n in self.nodes if number in n.inputs):
                if reader.name == "sub" and node.inputs[0] == reader.inputs[0]:
                    return any(
                        n.name == "exp" and reader.outputs[0] in n.inputs for n in self.nodes
                    )
                if reader.name in _KEEPING_MAXIMA:
                    waiting.append(reader.outputs[0])
        return False

    @functools.cached_property
    def _normalizations(self) -> set[str]:
        """Modules of one reciprocal square root, without products and modules inside of them."""
        scopes = {node.scope for node in self.nodes}
        outer = {scope[:i] for scope in scopes for i, c in enumerate(scope) if c == "/"}
        multiply = {node.scope for node in self.nodes if node.name in PRODUCTS}
        roots = {node.scope for node in self.nodes if node.name == "rsqrt"}
        return roots - outer - multiply - {""}

    def aval(self, atom: Atom) -> Any:
        """Return the shape and type of an atom."""
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
            if name in INLINED or (name in INLINED_FOR_PRODUCTS and products_inside(inner[0])):
                body = next(p for p in equation.params.values() if is_jaxpr(p))
                closed = getattr(body, "consts", ())
                results = self._inline(inner[0], closed, operands, here, loop)
            elif name == "scan" and _is_unrolled(equation):
                results = self._unroll(equation, operands, here, (*loop, id(equation)))
            elif (body := as_others(equation)) is not None:
                results = self._inline(body.jaxpr, body.consts, operands, here, loop)
            elif name == "convert_element_type" and isinstance(operands[0], Constant):
                dtype = equation.params["new_dtype"]
                results = [Constant(np.asarray(operands[0].value).astype(dtype)[()])]
            else:
                results = [self._variable(v.aval) for v in equation.outvars]
                node = TracedNode(equation, operands, tuple(results), here, loop)
                self.nodes.append(node)
                self.made_by.update((number, node) for number in results)
            known.update(zip(equation.outvars, results, strict=True))
        return [atom(v) for v in jaxpr.outvars]

    def _unroll(
        self, equation: Any, operands: tuple[Atom, ...], scope: str, loop: tuple[int, ...]
    ) -> list[Atom]:
        """Inline all iterations of a scan; return its results, carried and stacked."""
        params = equation.params
        body, constants, carried = _scan_parts(equation)
        shared, carry = operands[:constants], list(operands[constants : constants + carried])
        over = operands[constants + carried :]
        start = jax.make_jaxpr(lambda *xs: [jnp.copy(x) for x in xs])(*map(self.aval, carry))
        carry = self._inline(start.jaxpr, start.consts, carry, scope)
        self.carried.update(a for a in carry if isinstance(a, int))
        avals = [self.aval(a) for a in over]
        made: dict[int, list[Atom]] = {}
        iterations = range(params["length"])
        for iteration in reversed(iterations) if params["reverse"] else iterations:
            take = jax.make_jaxpr(lambda *xs, i=iteration: [x[i] for x in xs])(*avals)
            parts = self._inline(take.jaxpr, take.consts, over, scope)
            self.iterations.update((a, iteration) for a in parts if isinstance(a, int))
            given = (*shared, *carry, *parts)
            results = self._inline(body, getattr(params["jaxpr"], "consts", ()), given, scope, loop)
            carry, made[iteration] = results[:carried], results[carried:]
        stacked = []
        for column in zip(*(made[i] for i in iterations), strict=True):
            join = jax.make_jaxpr(lambda *xs: jnp.stack(xs))(*(self.aval(a) for a in column))
            stacked += self._inline(join.jaxpr, join.consts, column, scope)
        return [*carry, *stacked]


def _scan_parts(equation: Any) -> tuple[Any, int, int]:
    """Return a scan's body, and how many of its operands are constants and carried.

    JAX 0.10 says so in the equation (`num_consts`, `num_carry`), 0.11 no longer does. What a scan
    goes over, and what it stacks, has one axis more outside of the body than inside.
    """
    body = next(inner_jaxprs(equation))

    def sliced(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in pairs)

    carried = len(equation.outvars) - sliced(equation.outvars, body.outvars)
    over = sliced(equation.invars, body.invars)
    return body, len(equation.invars) - over - carried, carried


def _is_unrolled(equation: Any) -> bool:
    """Return whether a scan is unrolled: it holds products, and is short."""
    inner = next(inner_jaxprs(equation))
    return 0 < equation.params["length"] <= MAX_ITERATIONS and products_inside(inner) > 0


def is_jaxpr(value: Any) -> bool:
    """Return whether a value is a jaxpr, open or closed."""
    return isinstance(value, (jex_core.ClosedJaxpr, jex_core.Jaxpr))
