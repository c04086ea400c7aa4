"""Float islands: what has no integer form, written down as float operations.

`Islands.real` follows a tensor back through the operations that made it, to codes, to accumulators
with one multiplication, to constants and to the network's input, and emits a `FloatOp` for each
operation between. Calls are opened.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from jaxqat.integer import graph as g
from jaxqat.integer._convert.float_attributes import ENCODERS
from jaxqat.integer._convert.geometry import UnconvertibleError
from jaxqat.integer._convert.layout import Layout
from jaxqat.quant import _forms as forms
from jaxqat.quant._forms.primitives import Kind, primitive_of
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._trace.program import TracedNode, as_others, bind_equation, inner_jaxprs, is_jaxpr

# A value of the graph by its name, or an array of the program.
Value = str | Any

# They return their operand.
_COPIES = frozenset(
    {"copy", "copy_p", "optimization_barrier", "pvary", "stop_gradient", "sharding_constraint"}
)
# How a message names what cannot be in an integer network.
_REFUSED = MappingProxyType(
    {
        "while": "a loop whose number of iterations depends on the data",
        "cond": "a branch that depends on the data",
        "scan": "a loop that was not unrolled",
        "custom_partitioning": "a call of foreign code",
        "pure_callback": "a call of Python",
        "io_callback": "a call of Python",
        "debug_callback": "a call of Python",
        "ffi_call": "a call of foreign code",
        "random_bits": "random numbers",
        "random_wrap": "random numbers",
        "random_seed": "random numbers",
        "threefry2x32": "random numbers",
        "rng_bit_generator": "random numbers",
    }
)


class Islands:
    """Emits float operations.

    Args:
        emitter: Collects the nodes (`emit.Emitter`).
    """

    def __init__(self, emitter: Any):
        self._emitter = emitter
        self._known: dict[TracedNode, list[Value]] = {}
        self._results: dict[forms.Accumulator | forms.Paired, str] = {}
        self._growing: dict[TracedNode, bool] = {}
        self._dequantized: dict[str, str] = {}
        self._cast: dict[tuple[str, str], str] = {}

    def snapshot(self) -> tuple[Any, ...]:
        """Return what is known, for `restore`."""
        known, results = dict(self._known), dict(self._results)
        return known, results, dict(self._dequantized), dict(self._cast)

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Forget what was emitted since a snapshot."""
        self._known, self._results, self._dequantized, self._cast = snapshot

    def real(self, operand: forms.Operand) -> str:
        """Return the name under which float operations can read a tensor.

        Raises:
            UnconvertibleError: An operation before it can be no part of an integer network.
        """
        value = self._value(operand)
        if isinstance(value, str):
            return value
        return self._reshape(value, jnp.asarray(value), "constant")

    def result(self, operand: forms.Operand) -> str:
        """Return the name of a tensor that the network returns; its own input is copied."""
        name = self.real(operand)
        is_input = any(name == each.name for each in self._emitter.inputs)
        return self._reshape(name, operand.values, "result") if is_input else name

    def quantize(self, name: str, before: forms.Operand, grid: Grid) -> None:
        """Quantize a tensor whose first axis is not the batch, as float operations.

        Its readers see dequantized codes. A layer reads it behind a transposition, for which
        `Emitter.read` quantizes the transposed tensor; that recovers the codes.

        Args:
            name: Name of the tensor.
            before: The tensor before it is quantized.
            grid: Its grid.
        """
        x, zero = self.real(before), grid.zero
        operations = (
            ("mul", grid.inverse),
            ("round", None),
            ("max", grid.low - zero),
            ("min", grid.high - zero),
            ("mul", grid.scale),
        )
        for operation, value in operations:
            operands = [x] if value is None else [x, value]
            x = self._add(f"{name}/{operation}", operation, {}, operands, before.values)
        self._dequantized[name] = x

    def time_major(self, codes: forms.Codes) -> str | None:
        """Return the dequantized values of a tensor of `quantize`; None for other tensors."""
        if codes.moved is None:
            return self._dequantized.get("/".join(codes.name))
        operation, before = codes.moved
        x = self.time_major(before)
        if x is None or operation.name not in ENCODERS:
            return None
        kind, encode = ENCODERS[operation.name]
        attributes = encode(operation.params, [before.codes], codes.codes)
        aval = jax.ShapeDtypeStruct(codes.codes.shape, jnp.float32)
        return self._add(f"{x}/{kind}", kind, attributes, [x], aval)

    def rearranged(self, name: str, traced: Any, layout: Layout) -> str:
        """Return a product's real result in the traced layout.

        Args:
            name: The result as the graph has it.
            traced: The traced result.
            layout: Its layout.
        """
        shape = [traced.shape[axis] for axis in layout.result]
        apart = jax.ShapeDtypeStruct(shape, jnp.float32)
        x = self._reshape(name, apart, name) if layout.outputs > 1 else name
        axes = [layout.result.index(axis) for axis in range(len(layout.result))]
        if axes == sorted(axes):
            return x
        aval = jax.ShapeDtypeStruct(traced.shape, jnp.float32)
        return self._add(f"{name}/transpose", "transpose", {"axes": axes}, [x], aval)

    def _value(self, operand: forms.Operand) -> Value:
        if operand.constant and not self._grows(operand):
            return operand.values
        if _is_integer(operand):
            name = self._emitter.attempt(lambda: self._from_codes(operand.form))
            if name is not None:
                return self._typed(name, operand.values, "float32")
        made = operand.made
        if made is None:
            if operand.constant:
                return operand.values
            given = self._emitter.read_input(operand.values)
            return self._typed(given.name, operand.values, given.type)
        node = made.node
        if node not in self._known:
            operands = [self._value(each) for each in made.operands()]
            self._known[node] = self._equation(node.equation, operands, node.scope)
        return self._known[node][made.place]

    def _grows(self, operand: forms.Operand) -> bool:
        """Return whether a constant is made of one that is repeated, perhaps for each example."""
        made = operand.made
        if made is None:
            return False
        if made.node not in self._growing:
            grows = _repeats(made.node.equation) or any(map(self._grows, made.operands()))
            self._growing[made.node] = grows
        return self._growing[made.node]

    def _from_codes(self, form: Any) -> str:
        """Return the name of a tensor of codes, or of a product's real result."""
        if isinstance(form, forms.Codes):
            return self.time_major(form) or self._emitter.read(form)
        return self.exact(form)

    def exact(self, form: forms.Accumulator | forms.Paired) -> str:
        """Return the name of the real result of a product or an average, emitted once."""
        if form not in self._results:
            self._results[form] = self._emitter.real_result(form)
        return self._results[form]

    def _typed(self, name: str, values: Any, dtype: str) -> str:
        """Return a value of the graph in the model's own type, such as bfloat16."""
        wanted = np.dtype(values.dtype).name
        if wanted == dtype:
            return name
        if (name, wanted) not in self._cast:
            attributes = {"dtype": wanted}
            self._cast[name, wanted] = self._add(f"{name}/cast", "cast", attributes, [name], values)
        return self._cast[name, wanted]

    def _equation(self, equation: Any, operands: list[Value], scope: str) -> list[Value]:
        """Return the results of an equation."""
        name = equation.primitive.name
        constant = not any(isinstance(value, str) for value in operands)
        if constant and not _repeats(equation):
            return bind_equation(equation, operands)
        if name in _COPIES:
            return operands
        if name in _REFUSED:
            raise _refusal(equation, scope)
        if any(True for _ in inner_jaxprs(equation)):
            body = next(p for p in equation.params.values() if is_jaxpr(p))
            return self._body(body, operands, scope)
        simpler = as_others(equation)
        if simpler is not None:
            return self._body(simpler, operands, scope)
        if name == "clamp":
            return self._clamp(equation, operands, scope)
        encode = ENCODERS.get(name)
        if encode is None:
            raise _refusal(equation, scope)
        operation, attributes = encode
        avals = [_aval(v.aval) for v in equation.invars]
        out = equation.outvars[0].aval
        found = attributes(equation.params, avals, out)
        return [self._add(_named(scope, operation), operation, found, operands, out)]

    def _clamp(self, equation: Any, operands: list[Value], scope: str) -> list[Value]:
        low, x, high = operands
        aval = equation.outvars[0].aval
        for operation, bound in (("max", low), ("min", high)):
            x = self._add(_named(scope, operation), operation, {}, [x, bound], aval)
        return [x]

    def _reshape(self, x: Value, aval: Any, scope: str) -> str:
        attributes = {"shape": list(aval.shape)}
        return self._add(_named(scope, "reshape"), "reshape", attributes, [x], aval)

    def _body(self, body: Any, operands: list[Value], scope: str) -> list[Value]:
        """Return the results of a call from its body, a jaxpr."""
        jaxpr = getattr(body, "jaxpr", body)
        known: dict[Any, Value] = dict(zip(jaxpr.invars, operands, strict=True))
        known.update(zip(jaxpr.constvars, getattr(body, "consts", ()), strict=True))

        def read(v: Any) -> Value:
            return v.val if isinstance(v, jex_core.Literal) else known[v]

        for equation in jaxpr.eqns:
            inner = str(equation.source_info.name_stack)
            here = "/".join(part for part in (scope, inner) if part)
            results = self._equation(equation, [read(v) for v in equation.invars], here)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _add(
        self,
        name: str,
        operation: str,
        attributes: dict[str, Any],
        operands: Sequence[Value],
        aval: Any,
    ) -> str:
        """Emit an operation; return the name of its result.

        Args:
            name: Its name, perhaps not unique.
            operation: A key of `OPERATIONS`.
            attributes: Its attributes; 'unbatched' are sizes of axes along which it mixes elements,
                of which the batch must not be one.
            operands: What it reads.
            aval: Shape and type of its result.
        """
        unbatched = attributes.pop("unbatched", [])
        emitter = self._emitter
        fields = {
            "name": emitter.unique(name),
            "inputs": tuple(value for value in operands if isinstance(value, str)),
            "output": emitter.unique(f"{name}/real"),
            "operation": operation,
            "attributes": _plain(attributes),
            "constants": tuple(
                None if isinstance(value, str) else emitter.defer(value, np.asarray)
                for value in operands
            ),
            "shape": _plain(aval.shape),
            "dtype": np.dtype(aval.dtype).name,
            "unbatched": _plain(unbatched),
        }
        emitter.nodes.append((g.FloatOp, fields))
        return fields["output"]


def _is_integer(operand: forms.Operand) -> bool:
    """Return whether a tensor is codes, or the result of a product or an average itself.

    What follows a product, such as a bias, is computed in float, as in training: the form would
    round it to whole units of the accumulator.
    """
    if operand.values is not None and not jnp.issubdtype(operand.values.dtype, jnp.floating):
        return False  # The input itself, such as pixels.
    if operand.made is None or isinstance(operand.form, forms.Codes):
        return isinstance(operand.form, forms.Codes)
    primitive = primitive_of(operand.made.node.name)
    sums = primitive.is_product or primitive.kind is Kind.SUM
    return sums and isinstance(operand.form, forms.Accumulator | forms.Paired)


def _repeats(equation: Any) -> bool:
    """Return whether an equation repeats a tensor along an axis."""
    if equation.primitive.name not in ("broadcast_in_dim", "tile"):
        return False
    return equation.outvars[0].aval.size > equation.invars[0].aval.size


def _refusal(equation: Any, scope: str) -> UnconvertibleError:
    name = equation.primitive.name
    what = _REFUSED.get(name, "an operation that float islands do not support")
    where = f" in {scope}" if scope else ""
    return UnconvertibleError(f"'{name}'{where} is {what}")


def _aval(aval: Any) -> Any:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _plain(value: Any) -> Any:
    """Return numbers as Python's, and sequences as lists."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def _named(scope: str, operation: str) -> str:
    return f"{scope}/{operation}" if scope else operation
