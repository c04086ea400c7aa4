"""Nodes of products and averages, with the fields that requantize them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.integer import graph as g
from jaxqat.integer._convert.fields import Deferred, Requirement
from jaxqat.integer._convert.geometry import (
    UnconvertibleError,
    conv_fields,
    dense_weights,
    pool_fields,
)
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
        """A name of its own: a layer that is used twice makes two nodes."""
        uses = self._names[name] = self._names.get(name, 0) + 1
        return name if uses == 1 else f"{name}#{uses}"

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
        fields = {
            **self._requantized(form, grid, where),
            "weights": self.defer(weights, arrange),
            "weight_bits": source.weight_bits,
            "inputs": (self.read(source.codes),),
            "output": output,
            "name": self.unique(where),
            "kind": product.kind,
            **more,
        }
        self.nodes.append((g.Product, fields))

    def _requantized(
        self, form: forms.Accumulator, grid: Grid | None, where: str
    ) -> dict[str, Any]:
        """Bias, factors and signs of a product, one for each channel."""
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
        """A sum with a bias or factors per channel: a depthwise convolution with ones."""
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
            own = {"name": self.unique(f"{output}/squeeze"), "inputs": (fields["output"],)}
            move = {**own, "output": output, "kind": "reshape", "shape": (channels,)}
            self.nodes.append((g.Move, move))


def as_array(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.asarray(array, dtype)


def scalar(dtype: Any) -> Callable[[np.ndarray], Any]:
    return lambda array: dtype(array)
