# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Injection by hand into NNX layers; see `injected`."""

from typing import Any

from flax import nnx

from jaxqat.errors import RecipeError
from jaxqat.quant._models.aqt_calls import QuantizedProduct
from jaxqat.quant._models.injected import (
    ProductFunction,
    check_seen,
    checked_recipe,
    evaluate,
    of_layer,
)
from jaxqat.quant._models.nnx import QuantState
from jaxqat.quant._numerics.ranges import empty_range
from jaxqat.quant.recipe import Recipe


class _InjectedNnx(nnx.Module, QuantizedProduct):
    """A quantized product within an NNX layer.

    Attributes:
        recipe: How it is quantized; None leaves it in float.
        quant: The range of the layer's input.
        use_running_average: Whether the range is frozen; `train` and `eval` set it.
    """

    def __init__(self, recipe: Recipe | str, kind: str):
        checked = checked_recipe(recipe)
        if checked.rules:
            raise RecipeError(
                "A product within an NNX layer does not know its path, so it takes no rules: give "
                "each layer a recipe of its own, or use jaxqat.quantize."
            )
        self.recipe = of_layer(checked, "", kind)
        if self.recipe is not None and self.recipe.rounding != "nearest":
            raise RecipeError(
                "A product within an NNX layer does not know its path, which seeds rounding "
                f"{self.recipe.rounding!r}: set rounding to 'nearest', or use jaxqat.quantize."
            )
        self.quant = QuantState(empty_range())
        self.use_running_average = False

    def _multiply(self, product: ProductFunction, x: Any, weights: Any) -> Any:
        if self.recipe is None:
            return product(x, weights)
        moves = not self.use_running_average
        state = None if self.recipe.act_range == "dynamic" else self.quant.get_value()
        if state is not None and not moves:
            check_seen(state, "layer")
        result, after = evaluate(self.recipe, product, x, weights, state, moves=moves, path="layer")
        if moves and state is not None:
            self.quant.set_value(after)
        return result


class NNXDotGeneral(_InjectedNnx):
    """A quantized `jax.lax.dot_general` for an NNX layer; the right operand is the weights.

        nnx.Linear(8, 4, dot_general=jaxqat.aqt.NNXDotGeneral("int8"), rngs=rngs)

    Each layer needs one of its own: those that share one, as the projections of
    `nnx.MultiHeadAttention` do, share a range. It holds the range of the layer's input, which moves
    after `layer.train()` and not after `layer.eval()`, as in a module of `jaxqat.quantize`. Its
    state is `layer.dot_general.quant`, that of the transformed module `quantized.quant`, by layer:

        quantized.quant.set_value({"head": {"input": layer.dot_general.quant.get_value()}})

    Args:
        recipe: A `Recipe` without rules, or the name of a preset.

    Raises:
        RecipeError: There is no such preset, or the recipe needs the whole network.
    """

    def __init__(self, recipe: Recipe | str = "int8"):
        super().__init__(recipe, "dense")

    def __call__(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the product; the arguments are those of `jax.lax.dot_general`."""
        product = ProductFunction.of("dot_general", args, kwargs)
        return self._multiply(product, lhs, rhs)


class NNXConvGeneralDilated(_InjectedNnx):
    """A quantized `jax.lax.conv_general_dilated` for an NNX convolution; see `NNXDotGeneral`.

    nnx.Conv(3, 8, (3, 3), conv_general_dilated=NNXConvGeneralDilated("int8"), rngs=rngs)
    """

    def __init__(self, recipe: Recipe | str = "int8"):
        super().__init__(recipe, "conv")

    def __call__(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the product; the arguments are those of `jax.lax.conv_general_dilated`."""
        product = ProductFunction.of("conv_general_dilated", args, kwargs)
        return self._multiply(product, lhs, rhs)
