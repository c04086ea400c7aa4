# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The program that computes the arrays of a graph, without what only the model's results need."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from jaxqat.quant._trace.program import INLINED, bind_equation, is_jaxpr

# The last programs by their key, which XLA need not compile again: two networks of one model and
# recipe, as before and after training, have the same.
_RECENT: dict[bytes, Callable[..., list[jax.Array]]] = {}
_MOST = 2  # They keep the arrays that they hold, such as weights that a function closes over.
_LOCK = threading.Lock()

# Calls whose derivative rules nobody needs here. JAX keeps them whole, with all of their inputs.
_WITH_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})


class ArraysProgram:
    """A function of arrays, reduced to the operations that its results depend on.

    Most of a model's inference depends on its inputs, and few arrays of its graph do: what is left
    compiles in a fraction of the time, and is often the same for every batch size.

    Attributes:
        text: The program in StableHLO.
        key: A digest of the program and its constants; equal programs have equal keys.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        """Trace a function.

        Args:
            function: Takes lists of arrays, and returns one.
            *arguments: The lists, of arrays or of their shapes and types.
        """
        traced = jax.make_jaxpr(function)(*arguments)

        def inlined(*values: Any) -> list[Any]:
            return _results(traced.jaxpr, traced.consts, values)

        flat = jax.make_jaxpr(inlined)(*traced.in_avals)
        jaxpr, self._used = dce_jaxpr(flat.jaxpr, [True] * len(flat.jaxpr.outvars))
        consts = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        kept = [consts[v] for v in jaxpr.constvars]

        def arrays(*values: Any) -> list[Any]:
            return _results(jaxpr, kept, values)

        self._run = jax.jit(arrays)
        avals: Any = [v.aval for v in jaxpr.invars]  # Without the devices of the arrays.
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        self.text = self._run.lower(*shapes).as_text()
        # JAX 0.10 prints constants, unless 'jax_use_simplified_jaxpr_constants' is set.
        self.key = _digest(self.text, _constants(jaxpr, kept))
        with _LOCK:
            self._run = _RECENT.pop(self.key, self._run)
            _RECENT[self.key] = self._run
            if len(_RECENT) > _MOST:
                del _RECENT[next(iter(_RECENT))]

    def __call__(self, *arguments: Sequence[Any]) -> list[jax.Array]:
        """Compile the program and return its results.

        Args:
            *arguments: Lists of arrays; one that no result depends on may be a shape and type.
        """
        values = jax.tree.leaves(arguments)
        needed = [x for x, is_used in zip(values, self._used, strict=True) if is_used]
        arrays = [
            jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
            for x in needed
        ]
        return self._run(*arrays)


def _results(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr, and the calls in it that mean no more than their body."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = [value(atom) for atom in equation.invars]
        if equation.primitive.name in INLINED | _WITH_DERIVATIVES:
            body = next(p for p in equation.params.values() if is_jaxpr(p))
            closed = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())
            made = _results(closed.jaxpr, closed.consts, operands)
        else:
            made = bind_equation(equation, operands)
        known.update(zip(equation.outvars, made, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _constants(jaxpr: Any, consts: Sequence[Any]) -> Iterator[Any]:
    """Yield the constant arrays of a jaxpr and of the calls in it."""
    yield from consts
    for equation in jaxpr.eqns:
        yield from (v.val for v in equation.invars if isinstance(v, Literal) and np.ndim(v.val))
        for value in equation.params.values():
            for body in value if isinstance(value, (tuple, list)) else (value,):
                if is_jaxpr(body):
                    yield from _constants(getattr(body, "jaxpr", body), getattr(body, "consts", ()))


def _digest(text: str, arrays: Iterator[Any]) -> bytes:
    digest = hashlib.sha256(text.encode())
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.digest()
