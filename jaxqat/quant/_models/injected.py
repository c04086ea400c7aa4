# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Injection by hand: the product of a single Linen layer becomes integer.

A layer with `dot_general_cls` or `conv_general_dilated_cls` multiplies by what is injected there,
as with AQT's own `AqtDotGeneral`. Ranges have the names that `jaxqat.quantize` gives them, so a
checkpoint goes from one way to the other. What stands between layers stays in float: residual
additions, batch norm and pooling become integer only by `jaxqat.quantize`, where they have ranges
of their own. A checkpoint of a model with such operations has none: calibrate the transformed model
with its parameters.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxqat.errors import QuantizationError, RecipeError
from jaxqat.quant._interpret import Mode
from jaxqat.quant._models.aqt_calls import QuantizedProduct
from jaxqat.quant._models.quantize import as_recipe
from jaxqat.quant._models.state import QUANT, state_collections
from jaxqat.quant._models.stateless import QuantizedFunction
from jaxqat.quant._numerics.ranges import Range, empty_range
from jaxqat.quant._plan.plan import LEARNED
from jaxqat.quant.recipe import SETTINGS, Recipe


@dataclasses.dataclass(frozen=True)
class ProductFunction:
    """A product as a layer asks for it; equal for equal arguments.

    Attributes:
        operation: Its name in `jax.lax`.
        args: What the layer passes behind the operands.
        kwargs: Likewise, by name.
    """

    operation: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """Take the arguments of a call."""
        return cls(operation, args, tuple(kwargs.items()))

    def __call__(self, x: Any, weights: Any) -> Any:
        return getattr(jax.lax, self.operation)(x, weights, *self.args, **dict(self.kwargs))


@dataclasses.dataclass(frozen=True)
class _OfLayer:
    """A product as a function of the parameters of a model with one layer, and its input."""

    product: ProductFunction
    path: str

    def __call__(self, params: Any, x: Any) -> Any:
        return self.product(x, params[self.path]["weights"])


def dot_general_cls(recipe: Recipe | str = "int8") -> Callable[[], nn.Module]:
    """Return what makes a Linen layer such as `nn.Dense` multiply int8 codes.

        nn.Dense(10, dot_general_cls=jaxqat.aqt.dot_general_cls("int8"))

    The right operand is the weights. Ranges are in the collection 'quant', under the layer's path,
    and move while it is mutable, as in a module of `jaxqat.quantize`:

        logits, updates = module.apply(variables, x, mutable=["quant"])

    A layer that is called several times has one range for all calls.

    Args:
        recipe: A `Recipe` or the name of a preset; its rules match the layer's path.

    Raises:
        RecipeError: There is no such preset, or the recipe needs the whole network: learned step
            sizes start from its calibration, and `first_last_bits` from its order.
    """
    return functools.partial(DotGeneral, recipe=checked_recipe(recipe), name="input")


def conv_general_dilated_cls(recipe: Recipe | str = "int8") -> Callable[[], nn.Module]:
    """Return what makes a Linen convolution multiply int8 codes; see `dot_general_cls`.

    nn.Conv(16, (3, 3), conv_general_dilated_cls=jaxqat.aqt.conv_general_dilated_cls("int8"))
    """
    return functools.partial(ConvGeneralDilated, recipe=checked_recipe(recipe), name="input")


class _Injected(nn.Module, QuantizedProduct):
    """A quantized product within a layer; a subclass names JAX's operation and the kind of layer.

    Attributes:
        recipe: How it is quantized.
    """

    recipe: Recipe

    operation: ClassVar[str] = "dot_general"
    kind: ClassVar[str] = "dense"

    @nn.compact
    def __call__(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the product; the arguments are those of the operation."""
        product = ProductFunction.of(self.operation, args, kwargs)
        return _of_linen(self, self.recipe, self.kind, product, lhs, rhs)


class DotGeneral(_Injected):
    """A quantized `jax.lax.dot_general` within a layer."""


class ConvGeneralDilated(_Injected):
    """A quantized `jax.lax.conv_general_dilated` within a layer."""

    operation: ClassVar[str] = "conv_general_dilated"
    kind: ClassVar[str] = "conv"


def _of_linen(
    module: nn.Module, recipe: Recipe, kind: str, product: ProductFunction, x: Any, weights: Any
) -> Any:
    path = "/".join(module.path[:-1]) or "kernel"  # A layer at the top is named by its parameter.
    layer = of_layer(recipe, path, kind)
    if layer is None:
        return product(x, weights)
    moves = module.is_mutable_collection(QUANT)
    if layer.act_range == "dynamic":
        return evaluate(layer, product, x, weights, None, moves=moves, path=path)[0]
    if not (moves or module.has_variable(QUANT, "count")):
        raise QuantizationError(
            f"The variables hold no range for {path!r} (collection 'quant'). Initialize the module "
            "with them, and train or run it once with mutable=['quant'], so that they see data. "
            "Within nn.scan and nn.vmap, add 'quant' to variable_axes."
        )
    state: dict[str, Any] = {
        name: module.variable(QUANT, name, functools.partial(jnp.asarray, value))
        for name, value in empty_range().items()
    }
    before: Range = {name: variable.value for name, variable in state.items()}
    if not moves:
        check_seen(before, path)
    result, after = evaluate(layer, product, x, weights, before, moves=moves, path=path)
    if moves and not module.is_initializing():
        for name, variable in state.items():
            variable.value = after[name]
    return result


def of_layer(recipe: Recipe, path: str, kind: str) -> Recipe | None:
    """Return the recipe of one layer, without rules; None leaves it in float."""
    settings = recipe.settings(path, kind)
    if settings is None:
        return None
    fields = {name: getattr(settings, name) for name in SETTINGS}
    return dataclasses.replace(recipe, rules=(), **fields)


def check_seen(state: Range, path: str) -> None:
    """Refuse a range that has seen no data; inside of `jax.jit` it cannot be looked at.

    Raises:
        QuantizationError: It names the layer.
    """
    count = state["count"]
    if not isinstance(count, Tracer) and not np.asarray(count).any():
        raise QuantizationError(
            f"The range of {path!r} has seen no data, so its codes mean nothing. Train the module "
            "or run it once while ranges move (Linen: mutable=['quant']; NNX: before eval())."
        )


def evaluate(
    recipe: Recipe,
    product: ProductFunction,
    x: Any,
    weights: Any,
    state: Range | None,
    *,
    moves: bool,
    path: str,
) -> tuple[Any, Range]:
    """Return a quantized product of one layer, and the range of its input afterwards.

    Args:
        recipe: Of this layer.
        product: The product, in float.
        x: The activations.
        weights: The weights.
        state: The range of the activations; None if it is dynamic.
        moves: Whether the range moves.
        path: The layer, which seeds stochastic rounding.
    """
    key = (path, "input")
    model = QuantizedFunction(_OfLayer(product, path), recipe)
    ranges = {} if state is None else state_collections({key: state})
    bound = model.bind({"params": {path: {"weights": weights}}, **ranges})
    mode = Mode.TRAIN if moves else Mode.FROZEN
    (result, _), after = bound.run((x,), mode)
    return result, after.get(key, {})


def checked_recipe(recipe: Recipe | str) -> Recipe:
    """Return the recipe for single layers, or refuse one that needs the whole network."""
    found = as_recipe(recipe)
    every = (found, *(rule.over(found) for rule in found.rules))
    if any(s.weight_range == "lsq" or s.act_range in LEARNED for s in every):
        raise RecipeError(
            "Injection into single layers takes no learned step sizes or bounds (weight_range or "
            "act_range 'lsq', 'pact'): they start from a calibration of the whole network; use "
            "jaxqat.quantize."
        )
    if found.first_last_bits is not None:
        raise RecipeError(
            "Injection into single layers takes no first_last_bits, since a layer does not know "
            "its place in the network: give the first and the last layer a recipe of their own, or "
            "use jaxqat.quantize."
        )
    return found
