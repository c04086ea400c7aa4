"""From integer forms to nodes: each quantized tensor, in order, becomes the nodes that make it.

`forms` says how a tensor follows from codes; an `Emitter` writes that down as operations that each
make int8 codes. It runs while the training graph's inference program is being traced, so that
every number (scales, codes, biases, multipliers) is computed by that very program: `Deferred`
stands for an array until the program has run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.integer import graph as g
from jaxqat.integer._convert.geometry import (
    UnconvertibleError,
    conv_fields,
    dense_weights,
    move_fields,
    pool_fields,
)
from jaxqat.quant import _forms as forms
from jaxqat.quant._numerics.grids import Grid

OUTPUT = "output"


@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that the program has yet to compute, and what to make of it then."""

    index: int
    finish: Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Clipping in real units, from operations such as ReLU and ReLU6."""

    low: float | None = None
    high: float | None = None

    def then(self, clamp: forms.Clamp) -> "Bounds | None":
        """These bounds behind a clamp, as one pair; None if they do not overlap."""
        low = max((b for b in (self.low, clamp.low) if b is not None), default=None)
        high = min((b for b in (self.high, clamp.high) if b is not None), default=None)
        return None if low is not None and high is not None and low > high else Bounds(low, high)

    def hold_zero(self) -> bool:
        """Whether a real zero, as padding adds it, is within."""
        return (self.low is None or self.low <= 0) and (self.high is None or self.high >= 0)


class Emitter:
    """Collects nodes and tensors.

    Attributes:
        arrays: What the deferred fields are made of, in order.
        nodes: Class and fields of each node, in order.
        tensors: Fields of each tensor, by name.
        requirements: Place of a condition in `arrays`, and what is wrong where it does not hold.
    """

    def __init__(self):
        self.arrays: list[jax.Array] = []
        self.requirements: list[tuple[int, str]] = []
        self.nodes: list[tuple[type[g.Node], dict[str, Any]]] = []
        self.tensors: dict[str, dict[str, Any]] = {}
        self._moved: dict[int, str] = {}
        self._sources: list[forms.Codes] = []  # So that the ids in `_moved` are not reused.
        self._names: dict[str, int] = {}
        self.input_shape: tuple[int, ...] | None = None

    def defer(self, array: Any, finish: Callable[[np.ndarray], Any]) -> Deferred:
        """Note an array of the program for a field of a node."""
        self.arrays.append(jnp.asarray(array))
        return Deferred(len(self.arrays) - 1, finish)

    def require(self, condition: Any, reason: str) -> None:
        """Note a condition on the program's numbers; `reason` says what is wrong if it is false."""
        self.arrays.append(jnp.asarray(condition))
        self.requirements.append((len(self.arrays) - 1, reason))

    def site(self, name: tuple[str, ...], form: forms.Form, codes: forms.Codes) -> None:
        """Emit the nodes that make a quantized tensor of the training graph."""
        self.emit(form, codes.grid, "/".join(name), codes.codes.shape[1:], Bounds())

    def emit(
        self, form: forms.Form, grid: Grid, name: str, shape: tuple[int, ...], bounds: Bounds
    ) -> None:
        """Emit the nodes that put a form on a grid, clipped; the last makes the tensor `name`."""
        _EMITTERS[type(form)](self, form, grid, name, shape, bounds)

    def _clamp(self, form: forms.Clamp, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        merged = bounds.then(form)
        if merged is not None:
            return self.emit(form.inner, grid, name, shape, merged)
        self.emit(form, grid, inner := self._name(f"{name}/clipped"), shape, Bounds())
        self._requantize(name, inner, grid, grid, shape, bounds)

    def _accumulator(
        self, form: forms.Accumulator, grid: Grid, name: str, shape, bounds: Bounds
    ) -> None:
        self._tensor(name, grid, shape, bounds)
        self.accumulate(form, grid, name)

    def _codes(self, form: forms.Codes, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        self._requantize(name, self.read(form), form.grid, grid, shape, bounds)

    def read(self, codes: forms.Codes) -> str:
        """Name of a tensor of codes; moved codes are made here."""
        if codes.moved is None:
            return "/".join(codes.name)
        if id(codes) not in self._moved:
            operation, before = codes.moved
            source = self.read(before)
            name = self._name(f"{source}/{operation.name}")
            after = codes.codes.shape
            self._tensor_like(source, name, after[1:], operation, codes.grid)
            self._add_move(operation, source, before.codes.shape, name, after)
            self._moved[id(codes)] = name
            self._sources.append(codes)
        return self._moved[id(codes)]

    def accumulate(self, form: forms.Accumulator, grid: Grid | None, output: str) -> None:
        """A product or a pool with its requantization; without a grid its result is real."""
        if isinstance(form.source, forms.Multiplied):
            self._product(form, form.source, grid, output)
        else:
            self._pool(form, form.source, grid, output)

    def _product(
        self, form: forms.Accumulator, source: forms.Multiplied, grid: Grid | None, output: str
    ) -> None:
        where = source.path
        weights = source.weight_codes
        product: Any = source.product
        try:
            if product.kind == "conv":
                arrange, more = conv_fields(product, weights.shape)
            else:
                arrange, more = dense_weights(product, weights.shape, source.codes.codes.ndim), {}
        except UnconvertibleError as error:
            raise UnconvertibleError(f"{where}: {error}") from None
        channels = form.total.shape[-1]

        def per_channel(values: jax.Array) -> jax.Array:
            wanted = (1,) * (form.total.ndim - 1) + (channels,)
            if values.ndim and any(n != 1 for n in values.shape[:-1]):
                raise UnconvertibleError(f"{where}: its bias or factor is not one per channel")
            return jnp.broadcast_to(values, wanted).reshape(channels)

        varies, bias, scale, multiplier = map(per_channel, form.coefficients(grid))
        # The weights of a network that diverged: the graph refuses a scale that is NaN.
        finite = per_channel(jnp.isfinite(form.weight_scale) & jnp.isfinite(form.offset))
        scale = jnp.where(finite, scale, jnp.nan)
        sign = jnp.where(scale < 0, -1, 1)
        # A constant that is 0: any multiplier would do, and a graph wants a positive one.
        nothing = scale == 0
        unit = form.input_scale
        if grid is not None:
            unit = forms.quotient(unit, grid.scale)
        signs = jnp.where(varies, sign, 0)
        fields = {
            "weights": self.defer(weights, arrange),
            "weight_bits": source.weight_bits,
            "bias": self.defer(jnp.where(nothing, 0, bias * sign), _as(np.int32)),
            "multiplier": self.defer(jnp.where(nothing, unit, multiplier * sign), _as(np.float32)),
            "weight_scale": self.defer(jnp.where(nothing, 1, scale * sign), _as(np.float32)),
            "weight_signs": self.defer(jnp.where(nothing, 0, signs), _as(np.int8)),
            "inputs": (self.read(source.codes),),
            "output": output,
            "name": self._name(where),
            "kind": product.kind,
            **more,
        }
        self.nodes.append((g.Product, fields))

    def _pool(
        self, form: forms.Accumulator, source: forms.Summed, grid: Grid | None, output: str
    ) -> None:
        operation, codes = source.operation, source.codes
        where = f"the average behind {self.read(codes)!r}"
        if form.weight_scale.ndim and form.weight_scale.size != 1:
            raise UnconvertibleError(f"{where}: is multiplied by one factor per channel")
        if form.offset.ndim:
            raise UnconvertibleError(f"{where}: a bias is added to it")
        _, bias, _, multiplier = form.coefficients(grid)
        # The sum itself is what is multiplied: a pool has no bias.
        self.require(bias == 0, f"{where}: a bias is added to it")
        self.require(multiplier > 0, f"{where}: its factor is not positive")
        fields = {
            **pool_fields(operation, codes.codes.shape, where),
            "multiplier": self.defer(multiplier.reshape(()), _scalar(np.float32)),
            "inputs": (self.read(codes),),
            "output": output,
            "name": self._name(f"{output}/average"),
        }
        self.nodes.append((g.SumPool, fields))

    def _quantize(self, form: forms.Real, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        if form.float_reason is not None:
            raise UnconvertibleError(f"{name}: {form.float_reason} before it has no integer form")
        if self.input_shape is not None:
            raise UnconvertibleError(f"{name}: a second float input; a graph has one")
        self.input_shape = shape
        self._tensor(name, grid, shape, bounds)
        inverse = self.defer(grid.inverse, _scalar(np.float32))
        fields = {"name": f"{name}/quantize", "inputs": (), "output": name, "inverse": inverse}
        self.nodes.append((g.Quantize, fields))

    def _sum(self, form: forms.Sum, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        terms = [term for term in (form.left, form.right) if isinstance(term, forms.Codes)]
        if len(terms) != 2:
            raise UnconvertibleError(f"{name}: adds a tensor that is not quantized")
        self._tensor(name, grid, shape, bounds)
        dyadic = form.dyadic(grid, terms)
        fields = {
            "name": self._name(f"{name}/add"),
            "inputs": tuple(map(self.read, terms)),
            "output": name,
            "factors": tuple(self.defer(factor, int) for factor in dyadic.factors),
            "shift": self.defer(dyadic.shift, int),
        }
        self.nodes.append((g.Add, fields))

    def _requantize(
        self, name: str, source: str, before: Grid, grid: Grid, shape, bounds: Bounds
    ) -> None:
        self._tensor(name, grid, shape, bounds)
        fields = {
            "name": self._name(f"{name}/requantize"),
            "inputs": (source,),
            "output": name,
            "multiplier": self.defer(forms.quotient(before.scale, grid.scale), _scalar(np.float32)),
        }
        self.nodes.append((g.Requantize, fields))

    def _move(self, form: forms.Moved, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        if form.operation.name == "pad" and not bounds.hold_zero():
            self.emit(form, grid, inner := self._name(f"{name}/padded"), shape, Bounds())
            return self._requantize(name, inner, grid, grid, shape, bounds)
        before = jax.eval_shape(lambda: form.inner.in_units(grid)).shape
        source = self._name(f"{name}/unmoved")
        self.emit(form.inner, grid, source, before[1:], bounds)
        self._tensor_like(source, name, shape, form.operation, grid)
        return self._add_move(form.operation, source, before, name, (before[0], *shape))

    def _add_move(self, operation: forms.Operation, source: str, before, name: str, after) -> None:
        node, fields = move_fields(operation, before, after, name)
        own = {"name": self._name(f"{name}/{operation.name}"), "inputs": (source,), "output": name}
        self.nodes.append((node, {**own, **fields}))

    def _join(self, form: forms.Joined, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        axis = form.operation.params["dimension"]
        if axis == 0:
            raise UnconvertibleError(f"{name}: a concatenation of batches")
        names = []
        for number, part in enumerate(form.parts):
            part_shape = jax.eval_shape(lambda part=part: part.in_units(grid)).shape[1:]
            names.append(self._name(f"{name}/part{number}"))
            self.emit(part, grid, names[-1], part_shape, bounds)
        self._tensor(name, grid, shape, bounds)
        fields = {"name": f"{name}/concat", "inputs": tuple(names), "output": name, "axis": axis}
        self.nodes.append((g.Concat, fields))

    def _tensor(self, name: str, grid: Grid, shape: tuple[int, ...], bounds: Bounds) -> None:
        def code(value: float) -> jax.Array:
            steps = jnp.round(value * grid.inverse) + grid.zero
            # NaN comes of a scale that is NaN, which the graph refuses by the tensor's name.
            return jnp.clip(jnp.nan_to_num(steps), grid.low, grid.high)

        low = grid.low if bounds.low is None else code(bounds.low)
        high = grid.high if bounds.high is None else code(bounds.high)
        self.tensors[name] = {
            "name": name,
            "shape": tuple(shape),
            "scale": self.defer(grid.scale, _scalar(np.float32)),
            "zero_point": self.defer(grid.zero, int),
            "low": self.defer(low, int),
            "high": self.defer(high, int),
        }

    def _tensor_like(
        self, source: str, name: str, shape, operation: forms.Operation, grid: Grid
    ) -> None:
        """The tensor that a move makes: what `source` holds and, behind padding, real zeros."""
        fields = {**self.tensors[source], "name": name, "shape": tuple(shape)}
        if operation.name == "pad":
            for key, widened in (("low", jnp.minimum), ("high", jnp.maximum)):
                bound = fields[key]
                code = self.arrays[bound.index] if isinstance(bound, Deferred) else bound
                fields[key] = self.defer(widened(code, grid.zero), int)
        self.tensors[name] = fields

    def _name(self, name: str) -> str:
        """A name of its own: a layer that is used twice makes two nodes."""
        uses = self._names[name] = self._names.get(name, 0) + 1
        return name if uses == 1 else f"{name}#{uses}"


# The nodes of each form. `Either` exists only where layers are switched off, never in conversion.
_EMITTERS: dict[type, Callable[..., None]] = {
    forms.Clamp: Emitter._clamp,
    forms.Real: Emitter._quantize,
    forms.Accumulator: Emitter._accumulator,
    forms.Codes: Emitter._codes,
    forms.Sum: Emitter._sum,
    forms.Moved: Emitter._move,
    forms.Joined: Emitter._join,
}


def _as(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.asarray(array, dtype)


def _scalar(dtype: Any) -> Callable[[np.ndarray], Any]:
    return lambda array: dtype(array)
