"""From integer forms to nodes: each quantized tensor, in order, becomes the nodes that make it.

`forms` says how a tensor follows from codes; an `Emitter` writes that down as operations that each
make int8 codes. It runs while the training graph's inference program is being traced, so that
every number (scales, codes, biases, multipliers) is computed by that very program: `Deferred`
stands for an array until the program has run.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.integer import graph as g
from jaxqat.integer._convert.fields import Bounds, Deferred
from jaxqat.integer._convert.geometry import UnconvertibleError, move_steps
from jaxqat.integer._convert.islands import Islands
from jaxqat.integer._convert.layout import Layout, batch_first, pair_of
from jaxqat.integer._convert.places import Place, input_at
from jaxqat.integer._convert.products import ProductEmitter, as_array, scalar
from jaxqat.integer._convert.repetitions import repetition, shape_of, unrepeated, unrepeating
from jaxqat.quant import _forms as forms
from jaxqat.quant._numerics.grids import Grid

_Result = TypeVar("_Result")


class Emitter(ProductEmitter):
    """Emits the nodes of every form.

    Attributes:
        strict: Whether what has no integer form is refused, and not computed in float.
        batch: Size of the batch.
        islands: Emits float operations.
    """

    def __init__(
        self,
        strict: bool = True,
        as_products: frozenset[str] = frozenset(),
        batch: int = 1,
        given: Sequence[tuple[Place, Any]] = (),
    ):
        """Start with no nodes.

        Args:
            strict: As the attribute.
            as_products: Parts that are emitted as products (`ProductEmitter`).
            batch: As the attribute.
            given: The arrays among the arguments of the model's call, each with its place.
        """
        super().__init__(as_products)
        self.strict, self.batch = strict, batch
        self.islands = Islands(self)
        self._moved: dict[int, str] = {}
        self._sources: list[forms.Codes] = []  # So that the ids in `_moved` are not reused.
        self._sliced: list[tuple[forms.Form, Grid, Bounds, str]] = []
        self._given = [(input_at(place, values), values) for place, values in given]

    def quantized(
        self, key: tuple[str, ...], form: forms.Form, before: forms.Operand, codes: forms.Codes
    ) -> None:
        """Emit the nodes that make a quantized tensor of the training graph.

        Args:
            key: Name of the tensor.
            form: What is rounded to its grid.
            before: The tensor before that.
            codes: The tensor.
        """
        name, grid, shape = "/".join(key), codes.grid, codes.codes.shape[1:]

        def emit() -> bool:
            self.emit(form, grid, name, shape, Bounds())
            return True

        if self.strict:
            emit()
        elif codes.codes.shape[:1] != (self.batch,):
            self.islands.quantize(name, before, grid)
        elif not self.attempt(emit):
            self._quantize_real(self.islands.real(before), grid, name, shape, Bounds())

    def attempt(self, emit: Callable[[], _Result]) -> _Result | None:
        """Call `emit`; without an integer form, undo its nodes and return None."""
        lists = (self.arrays, self.requirements, self.nodes, self._sliced)
        lengths = [len(x) for x in lists]
        before = dict(self.tensors), dict(self._moved), dict(self._names)
        islands = self.islands.snapshot()
        try:
            return emit()
        except UnconvertibleError:
            for items, length in zip(lists, lengths, strict=True):
                del items[length:]
            self.tensors, self._moved, self._names = before
            self.islands.restore(islands)
            return None

    @property
    def inputs(self) -> list[g.Input]:
        """An input for each array of the model's arguments, in their order."""
        return [each for each, _ in self._given]

    def read_input(self, values: Any) -> g.Input:
        """Return the network's input that is an array of the model's arguments."""
        found = next((each for each, array in self._given if array is values), None)
        if found is None:
            raise UnconvertibleError(
                f"{tuple(values.shape)} is neither an argument of the model's call nor a constant"
            )
        if tuple(values.shape[:1]) != (self.batch,):
            raise UnconvertibleError(
                f"the input {found} of the shape {tuple(values.shape)} has no value for each "
                "example of the batch. Give it the batch as its first axis, or make it a constant "
                "of the model"
            )
        return found

    def real_result(self, form: forms.Accumulator | forms.Paired) -> str:
        """Emit a product or an average without requantization; return the name of its result."""
        if isinstance(form, forms.Paired):
            self._mat_mul(form, None, output := self.unique(f"{form.path}/real"))
            return output
        source = form.source
        path = source.path if isinstance(source, forms.Multiplied) else self.read(source.codes)
        return self.accumulate(form, None, self.unique(f"{path}/real"))

    def rearranged(self, name: str, form: forms.Accumulator, layout: Layout) -> str:
        """Emit a product's real result in the traced layout; return its name."""
        if self.strict:
            several = "has several axes of channels" if layout.outputs > 1 else "is transposed"
            raise UnconvertibleError(f"{name}: its real result {several}")
        return self.islands.rearranged(name, form.total, layout)

    def emit(
        self, form: forms.Form, grid: Grid, name: str, shape: tuple[int, ...], bounds: Bounds
    ) -> None:
        """Emit the nodes that put a form on a grid, clipped; the last makes the tensor `name`."""
        _EMITTERS[type(form)](self, form, grid, name, shape, bounds)

    def _clamp(self, form: forms.Clamp, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        merged = bounds.then(form)
        if merged is not None:
            return self.emit(form.inner, grid, name, shape, merged)
        self.emit(form, grid, inner := self.unique(f"{name}/clipped"), shape, Bounds())
        self._requantize(name, inner, grid, grid, shape, bounds)

    def _accumulator(
        self, form: forms.Accumulator, grid: Grid, name: str, shape, bounds: Bounds
    ) -> None:
        self._tensor(name, grid, shape, bounds)
        self.accumulate(form, grid, name)

    def _codes(self, form: forms.Codes, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        self._requantize(name, self.read(form), form.grid, grid, shape, bounds)

    def read(self, codes: forms.Codes) -> str:
        """Return the name of a tensor of codes; moved codes are made here."""
        if isinstance(codes, forms.Pixels):
            return self._pixels(codes)
        real = self.islands.time_major(codes) if id(codes) not in self._moved else None
        if real is not None:
            if codes.moved is None or codes.codes.shape[:1] != (self.batch,):
                raise UnconvertibleError(f"{real}: its first axis is not the batch")
            name, shape = self.unique(f"{real}/codes"), codes.codes.shape[1:]
            self._quantize_real(real, codes.grid, name, shape, Bounds())
            self._moved[id(codes)] = name
            self._sources.append(codes)
        if codes.moved is None:
            return "/".join(codes.name)
        if id(codes) not in self._moved and (same := batch_first(codes)) is not codes:
            self._moved[id(codes)] = self.read(same)
            self._sources.append(codes)
        if id(codes) not in self._moved:
            operation, before = unrepeating(codes.moved, codes.codes.shape)
            source = self.read(before)
            name = self.unique(f"{source}/{operation.name}")
            after = codes.codes.shape
            self._add_move(operation, source, before.codes.shape, name, after, codes.grid)
            self._moved[id(codes)] = name
            self._sources.append(codes)
        return self._moved[id(codes)]

    def _pixels(self, codes: forms.Pixels) -> str:
        """Return the name of the network's uint8 input as codes; it is made here."""
        if id(codes) not in self._moved:
            source, name = self.read_input(codes.images), self.unique("pixels")
            self._quantize_real(source.name, codes.grid, name, source.shape, Bounds())
            self._moved[id(codes)] = name
            self._sources.append(codes)
        return self._moved[id(codes)]

    def _quantize(self, form: forms.Real, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        if form.float_reason is None:
            source = self.read_input(form.values).name
        elif self.strict:
            raise UnconvertibleError(f"{name}: {form.float_reason} before it has no integer form")
        else:
            source = self.islands.real(form.operand)
        self._quantize_real(source, grid, name, shape, bounds)

    def _quantize_scaled(
        self, form: forms.Scaled, grid: Grid, name: str, shape, bounds: Bounds
    ) -> None:
        def deferred(values: jax.Array) -> Deferred:
            one = values.reshape(values.shape[1:] or (1,) * len(shape))
            return self.defer(one, as_array(np.float32))

        names = g.Quantize.COEFFICIENTS
        more = dict(zip(names, map(deferred, form.coefficients), strict=True))
        source = self.read_input(form.values).name
        self._quantize_real(source, grid, name, shape, bounds, more)

    def _quantize_real(
        self,
        source: str,
        grid: Grid,
        name: str,
        shape,
        bounds: Bounds,
        more: dict[str, Deferred] | None = None,
    ) -> None:
        self._tensor(name, grid, shape, bounds)
        inverse = self.defer(grid.inverse, scalar(np.float32))
        fields = {"name": f"{name}/quantize", "inputs": (source,), "output": name}
        self.nodes.append((g.Quantize, {**fields, "inverse": inverse, **(more or {})}))

    def _table(self, form: forms.Tabulated, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        source = self.read(form.codes)
        self._tensor(name, grid, shape, bounds)
        low, high = (self.arrays[self.tensors[name][key].index] for key in ("low", "high"))
        codes = jnp.clip(form.table(grid), low, high)
        fields = {
            "name": self.unique(f"{name}/table"),
            "inputs": (source,),
            "output": name,
            "table": self.defer(codes, as_array(np.int8)),
        }
        self.nodes.append((g.Table, fields))

    def _sum(self, form: forms.Sum, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        terms = [term for term in (form.left, form.right) if isinstance(term, forms.Codes)]
        if len(terms) != 2:
            raise UnconvertibleError(f"{name}: adds a tensor that is not quantized")
        if terms[0].codes.shape != terms[1].codes.shape:
            raise UnconvertibleError(f"{name}: adds tensors of different shapes")
        self._tensor(name, grid, shape, bounds)
        dyadic = form.dyadic(grid, terms)
        fields = {
            "name": self.unique(f"{name}/add"),
            "inputs": tuple(map(self.read, terms)),
            "output": name,
            "factors": tuple(self.defer(factor, int) for factor in dyadic.factors),
            "shift": self.defer(dyadic.shift, int),
        }
        self.nodes.append((g.Add, fields))

    def _times(self, form: forms.Times, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        inputs = tuple(self.read(unrepeated(factor)) for factor in (form.left, form.right))
        self._tensor(name, grid, shape, bounds)
        fields = {
            "name": self.unique(f"{name}/multiply"),
            "inputs": inputs,
            "output": name,
            "multiplier": self.defer(form.multiplier(grid), scalar(np.float32)),
        }
        self.nodes.append((g.Multiply, fields))

    def _paired(self, form: forms.Paired, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        self._tensor(name, grid, shape, bounds)
        self._mat_mul(form, grid, name)

    def _mat_mul(self, form: forms.Paired, grid: Grid | None, output: str) -> None:
        operands, axes = pair_of(form)
        fields = {
            **axes,
            "name": self.unique(form.path),
            "inputs": tuple(map(self.read, operands)),
            "output": output,
            "multiplier": self.defer(form.multiplier(grid), scalar(np.float32)),
        }
        self.nodes.append((g.MatMul, fields))

    def _requantize(
        self, name: str, source: str, before: Grid, grid: Grid, shape, bounds: Bounds
    ) -> None:
        self._tensor(name, grid, shape, bounds)
        fields = {
            "name": self.unique(f"{name}/requantize"),
            "inputs": (source,),
            "output": name,
            "multiplier": self.defer(forms.quotient(before.scale, grid.scale), scalar(np.float32)),
        }
        self.nodes.append((g.Requantize, fields))

    def _move(self, form: forms.Moved, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        if form.operation.name == "pad" and not bounds.hold_zero():
            self.emit(form, grid, inner := self.unique(f"{name}/padded"), shape, Bounds())
            return self._requantize(name, inner, grid, grid, shape, bounds)
        before = shape_of(form.inner, grid)
        if isinstance(form.inner, forms.Moved):
            shapes = shape_of(form.inner.inner, grid), before, (before[0], *shape)
            both = repetition(form.operation, form.inner.operation, shapes)
            if both is not None:
                form, before = forms.Moved(form.inner.inner, both), shapes[0]
        source = self._unmoved(form.inner, grid, name, before[1:], bounds)
        return self._add_move(form.operation, source, before, name, (before[0], *shape), grid)

    def _unmoved(self, form: forms.Form, grid: Grid, name: str, shape, bounds: Bounds) -> str:
        """Return the name of what is moved; parts of one tensor on one grid are parts of codes."""
        for same, same_grid, same_bounds, source in self._sliced:
            if same is form and same_grid is grid and same_bounds == bounds:
                return source
        source = self.unique(f"{name}/unmoved")
        self.emit(form, grid, source, shape, bounds)
        self._sliced.append((form, grid, bounds, source))
        return source

    def _add_move(
        self, operation: forms.Operation, source: str, before, name: str, after, grid: Grid
    ) -> None:
        *steps, last = move_steps(operation, tuple(before), tuple(after), name)
        for step in (*steps, last):
            output = name if step is last else self.unique(f"{name}/{step.kind.__name__.lower()}")
            self._tensor_like(source, output, step.shape, operation, grid)
            own = {"name": self.unique(f"{output}/{operation.name}"), "inputs": (source,)}
            fields = {**own, "output": output, **step.fields}
            if isinstance(fields.get("indices"), jax.Array):
                fields["indices"] = self._indices(operation, fields["indices"], name)
            self.nodes.append((step.kind, fields))
            source = output

    def _join(self, form: forms.Joined, grid: Grid, name: str, shape, bounds: Bounds) -> None:
        axis = int(form.operation.params["dimension"])  # NumPy's in `jnp.roll`.
        if axis == 0:
            raise UnconvertibleError(f"{name}: a concatenation of batches")
        names = []
        for number, part in enumerate(form.parts):
            part_shape = jax.eval_shape(lambda part=part: part.in_units(grid)).shape[1:]
            names.append(self.unique(f"{name}/part{number}"))
            self.emit(part, grid, names[-1], part_shape, bounds)
        self._tensor(name, grid, shape, bounds)
        fields = {"name": f"{name}/concat", "inputs": tuple(names), "output": name, "axis": axis}
        self.nodes.append((g.Concat, fields))

    def _indices(self, operation: forms.Operation, indices: jax.Array, name: str) -> Deferred:
        inside = (indices >= 0) & (indices <= operation.params["last"])
        self.require(inside, f"{name}: it picks elements beyond the end of a tensor, which are NaN")
        return self.defer(indices, lambda array: tuple(map(int, array)))

    def _tensor(self, name: str, grid: Grid, shape: tuple[int, ...], bounds: Bounds) -> None:
        def code(value: float) -> jax.Array:
            nearest = jnp.round(value * grid.inverse) + grid.zero
            # NaN comes of a scale that is NaN, which the graph refuses by the tensor's name.
            return jnp.clip(jnp.nan_to_num(nearest), grid.low, grid.high)

        low = grid.low if bounds.low is None else code(bounds.low)
        high = grid.high if bounds.high is None else code(bounds.high)
        self.tensors[name] = {
            "name": name,
            "shape": tuple(shape),
            "scale": self.defer(grid.scale, scalar(np.float32)),
            "zero_point": self.defer(grid.zero, int),
            "low": self.defer(low, int),
            "high": self.defer(high, int),
        }

    def _tensor_like(
        self, source: str, name: str, shape, operation: forms.Operation, grid: Grid
    ) -> None:
        """Add the tensor of a move: what `source` holds and, behind padding, real zeros."""
        fields = {**self.tensors[source], "name": name, "shape": tuple(shape)}
        if operation.name == "pad":
            for key, widened in (("low", jnp.minimum), ("high", jnp.maximum)):
                bound = fields[key]
                code = self.arrays[bound.index] if isinstance(bound, Deferred) else bound
                fields[key] = self.defer(widened(code, grid.zero), int)
        self.tensors[name] = fields


# The nodes of each form. `Either` exists only where layers are switched off, never in conversion.
_EMITTERS: dict[type, Callable[..., None]] = {
    forms.Clamp: Emitter._clamp,
    forms.Real: Emitter._quantize,
    forms.Scaled: Emitter._quantize_scaled,
    forms.Accumulator: Emitter._accumulator,
    forms.Codes: Emitter._codes,
    forms.Pixels: Emitter._codes,
    forms.Sum: Emitter._sum,
    forms.Tabulated: Emitter._table,
    forms.Times: Emitter._times,
    forms.Paired: Emitter._paired,
    forms.Moved: Emitter._move,
    forms.Joined: Emitter._join,
}
