"""Nodes of products and averages, with the fields that requantize them."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.integer import graph as g
from jaxqat.integer._convert.fields import Deferred, Requirement
from jaxqat.integer._convert.geometry import UnconvertibleError, pool_fields
from jaxqat.integer._convert.layout import Layout, arrange_weights, conv_fields, layout_of, reshaped
from jaxqat.quant import _forms as forms
from jaxqat.quant._numerics.grids import Grid


class ProductEmitter(ABC):
    """Collects nodes and tensors; emits products and averages.

    Attributes:
        arrays: What the deferred fields are made of, in order.
        nodes: Class and fields of each node, in order.
        tensors: Fields of each tensor, by name.
        requirements: Conditions on the program's numbers.
        as_products: Averages that are more than that, by their numbers: they become products.
    """

    def __init__(self, as_products: frozenset[str]):
        self.as_products = as_products
        self.arrays: list[jax.Array] = []
        self.requirements: list[Requirement] = []
        self.nodes: list[tuple[type[g.Node], dict[str, Any]]] = []
        self.tensors: dict[str, dict[str, Any]] = {}
        self._names: dict[str, int] = {}

    @abstractmethod
    def read(self, codes: forms.Codes) -> str:
        """Return the name of a tensor of codes."""

    def defer(self, array: Any, finish: Callable[[np.ndarray], Any]) -> Deferred:
        """Note an array of the program for a field of a node."""
        self.arrays.append(jnp.asarray(array))
        return Deferred(len(self.arrays) - 1, finish)

    def require(self, condition: Any, reason: str, part: str | None = None) -> None:
        """Note a condition on the program's numbers; `reason` says what is wrong if it is false."""
        self.arrays.append(jnp.asarray(condition))
        self.requirements.append(Requirement(len(self.arrays) - 1, reason, part))

    def unique(self, name: str) -> str:
        """Return a name of its own: a layer that is used twice makes two nodes."""
        uses = self._names[name] = self._names.get(name, 0) + 1
        return name if uses == 1 else f"{name}#{uses}"

    @abstractmethod
    def rearranged(self, name: str, form: forms.Accumulator, layout: Layout) -> str:
        """Emit a product's real result in the traced layout; return its name."""

    def accumulate(self, form: forms.Accumulator, grid: Grid | None, output: str) -> str:
        """Emit a product or a pool with its requantization; without a grid its result is real.

        Returns:
            The name of the result; that of a real one can be another than `output`.
        """
        if isinstance(form.source, forms.Multiplied):
            return self._product(form, form.source, grid, output)
        self._pool(form, form.source, grid, output)
        return output

    def _product(
        self, form: forms.Accumulator, source: forms.Multiplied, grid: Grid | None, output: str
    ) -> str:
        product: Any = source.product
        data, weights = source.codes, source.weight_codes
        try:
            layout = layout_of(product, weights.shape, data.codes.shape, source.axes)
            data, more = layout.arranged(data), {}
            if product.kind == "conv":
                data, more = conv_fields(product, data)
            name = output if layout.is_plain else self._unarranged(form, layout, grid, output)
        except UnconvertibleError as error:
            raise UnconvertibleError(f"{source.path}: {error}") from None
        fields = {
            **self._requantized(form, grid, source.path, layout),
            "weights": self.defer(weights, arrange_weights(layout, product.kind)),
            "weight_bits": source.weight_bits,
            "inputs": (self.read(data),),
            "output": name,
            "name": self.unique(source.path),
            "kind": product.kind,
            **more,
        }
        self.nodes.append((g.Product, fields))
        if layout.is_plain:
            return output
        if grid is None:
            return self.rearranged(name, form, layout)
        self._arrange(form, layout, name, output)
        return output

    def _unarranged(
        self, form: forms.Accumulator, layout: Layout, grid: Grid | None, output: str
    ) -> str:
        """Return the name of a product's result before its axes are those of the trace."""
        name = self.unique(f"{output}/channels_last")
        if grid is not None:
            if layout.result[0] != 0:
                raise UnconvertibleError("the first axis of its result is not the batch")
            shape = layout.natural(form.total.shape)[1:]
            self.tensors[name] = {**self.tensors[output], "name": name, "shape": shape}
        return name

    def _arrange(self, form: forms.Accumulator, layout: Layout, name: str, output: str) -> None:
        """Emit the moves from a product's result to the axes of the trace."""
        axes = tuple(layout.result.index(axis) for axis in range(len(layout.result)))
        is_ordered = axes == tuple(range(len(axes)))
        if layout.outputs > 1:
            shape = tuple(form.total.shape[axis] for axis in layout.result[1:])
            apart = output if is_ordered else self.unique(f"{output}/apart")
            self.tensors[apart] = {**self.tensors[output], "name": apart, "shape": shape}
            self._emit_move(name, apart, kind="reshape", shape=shape)
            name = apart
        if not is_ordered:
            self._emit_move(name, output, kind="transpose", axes=axes)

    def _emit_move(self, source: str, output: str, **fields: Any) -> None:
        own = {"name": self.unique(f"{output}/{fields['kind']}"), "inputs": (source,)}
        self.nodes.append((g.Move, {**own, "output": output, **fields}))

    def _requantized(
        self, form: forms.Accumulator, grid: Grid | None, where: str, layout: Layout | None = None
    ) -> dict[str, Any]:
        """Return bias, factors and signs of a product, one for each channel."""
        rank = form.total.ndim
        layout = layout or Layout((), 1, (), tuple(range(rank)), 1)

        def per_channel(values: jax.Array) -> jax.Array:
            found = layout.by_channel(values, form.total.shape)
            if found is None:
                raise UnconvertibleError(f"{where}: its bias or factor is not one per channel")
            return found

        return self._coefficients(form, grid, per_channel)

    def _coefficients(
        self,
        form: forms.Accumulator,
        grid: Grid | None,
        arranged: Callable[[jax.Array], jax.Array],
    ) -> dict[str, Any]:
        """Return bias, factors and signs, each as `arranged` makes it of what fits the total."""
        varies, bias, scale, multiplier = map(arranged, form.coefficients(grid))
        # The weights of a network that diverged: the graph refuses a scale that is NaN.
        finite = arranged(jnp.isfinite(form.weight_scale) & jnp.isfinite(form.offset))
        scale = jnp.where(finite, scale, jnp.nan)
        sign = jnp.where(scale < 0, -1, 1)
        # A constant that is 0: any multiplier would do, and a graph wants a positive one.
        nothing = scale == 0
        unit = form.input_scale
        if grid is not None:
            unit = forms.quotient(unit, grid.scale)
        signs = jnp.where(varies, sign, 0)
        of_product = jnp.where(nothing, unit, multiplier * sign)
        return {
            "bias": self.defer(jnp.where(nothing, 0, bias * sign), as_array(np.int32)),
            "multiplier": self.defer(of_product, as_array(np.float32)),
            "weight_scale": self.defer(jnp.where(nothing, 1, scale * sign), as_array(np.float32)),
            "weight_signs": self.defer(jnp.where(nothing, 0, signs), as_array(np.int8)),
        }

    def _pool(
        self, form: forms.Accumulator, source: forms.Summed, grid: Grid | None, output: str
    ) -> None:
        operation, codes = source.operation, source.codes
        where = f"the average behind {self.read(codes)!r}"
        per_channel = form.offset.ndim or (form.weight_scale.ndim and form.weight_scale.size != 1)
        if source.weight != 1:
            return self._affine(form, source, grid, output)
        if per_channel or where in self.as_products:
            return self._pool_as_product(form, source, grid, output)
        _, bias, _, multiplier = form.coefficients(grid)
        # The sum itself is what is multiplied: a pool has no bias.
        self.require(bias == 0, f"{where}: a bias is added to it", where)
        self.require(multiplier > 0, f"{where}: its factor is not positive", where)
        fields = {
            **pool_fields(operation, codes.codes.shape, where),
            "multiplier": self.defer(multiplier.reshape(()), scalar(np.float32)),
            "inputs": (self.read(codes),),
            "output": output,
            "name": self.unique(f"{output}/average"),
        }
        self.nodes.append((g.SumPool, fields))

    def _pool_as_product(
        self, form: forms.Accumulator, source: forms.Summed, grid: Grid | None, output: str
    ) -> None:
        """Emit a sum with a bias or factors per channel: a depthwise convolution with ones."""
        if source.codes.codes.ndim == 2:
            return self._of_rows(form, source, grid, output)
        shape = source.codes.codes.shape
        where = f"the average behind {self.read(source.codes)!r}"
        pool = pool_fields(source.operation, shape, where)
        dropped = pool.pop("drop_axes")
        if dropped and grid is None:
            raise UnconvertibleError(f"{where}: is more than an average, and real")
        rank, channels = len(pool["window"]), shape[-1]
        ones = jnp.ones((*pool["window"], 1, channels), jnp.int8)
        fields = {
            **self._requantized(form, grid, where),
            **pool,
            "weights": self.defer(ones, as_array(np.int8)),
            "weight_bits": 8,
            "dilation": (1,) * rank,
            "groups": channels,
            "inputs": (self.read(source.codes),),
            "output": self.unique(f"{output}/unsqueezed") if dropped else output,
            "name": self.unique(f"{output}/average"),
            "kind": "conv",
        }
        del fields["window"]
        self.nodes.append((g.Product, fields))
        if dropped:
            self.tensors[fields["output"]] = {
                **self.tensors[output],
                "name": fields["output"],
                "shape": (*(1,) * rank, channels),
            }
            self._emit_move(fields["output"], output, kind="reshape", shape=(channels,))

    def _affine(
        self, form: forms.Accumulator, source: forms.Summed, grid: Grid | None, output: str
    ) -> None:
        """Emit codes with factors and terms that differ by place."""
        if grid is None:
            raise UnconvertibleError(f"{output}: is scaled by place, and real")

        def of_one_example(values: jax.Array) -> jax.Array:
            return values.reshape(values.shape[1:] or (1,) * (form.total.ndim - 1))

        found = self._coefficients(form, grid, of_one_example)
        signs = self.arrays[found["weight_signs"].index]
        fields = {
            "weights": self.defer(signs * source.weight, as_array(np.int32)),
            "bias": found["bias"],
            "multiplier": found["multiplier"],
            "inputs": (self.read(source.codes),),
            "output": output,
            "name": self.unique(f"{output}/affine"),
        }
        self.nodes.append((g.Affine, fields))

    def _of_rows(
        self, form: forms.Accumulator, source: forms.Summed, grid: Grid | None, output: str
    ) -> None:
        """Emit factors per channel of (batch, channels), as of one pixel: (batch, 1, channels)."""
        if grid is None:
            raise UnconvertibleError(f"{output}: is scaled by channel, and real")

        def with_pixel(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], 1, x.shape[-1]) if x.ndim else x

        batch, channels = source.codes.codes.shape
        pixel = reshaped(source.codes, (batch, 1, channels))
        parts = {
            name: with_pixel(getattr(form, name))
            for name in ("total", "correction", "weight_scale", "offset")
        }
        source = dataclasses.replace(source, codes=pixel)
        inner = self.unique(f"{output}/pixel")
        self.tensors[inner] = {**self.tensors[output], "name": inner, "shape": (1, channels)}
        self._pool_as_product(
            dataclasses.replace(form, **parts, source=source), source, grid, inner
        )
        self._emit_move(inner, output, kind="reshape", shape=(channels,))


def as_array(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.asarray(array, dtype)


def scalar(dtype: Any) -> Callable[[np.ndarray], Any]:
    return lambda array: dtype(array)
