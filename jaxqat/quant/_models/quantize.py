# pyright: strict, reportUnknownMemberType=false
"""`jaxqat.quantize`: the quantized form of a model of any kind."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args, overload

import flax.linen as nn

from jaxqat.errors import QuantizationError, RecipeError
from jaxqat.quant._aqt import AqtConfiguration, from_aqt, is_configuration
from jaxqat.quant._interpret import Memory
from jaxqat.quant._models.bound import QuantizedModel
from jaxqat.quant._models.linen import QuantizedModule
from jaxqat.quant._models.stateless import QuantizedEquinox, QuantizedFunction
from jaxqat.quant.recipe import Recipe

if TYPE_CHECKING:  # Importing flax.nnx imports optax.
    from flax import nnx

    from jaxqat.quant._models.nnx import QuantizedNNX


# A module is callable too; the first overload that fits gives the type.
@overload
def quantize(  # pyright: ignore[reportOverlappingOverload]
    model: nn.Module, recipe: Recipe | str | AqtConfiguration = ..., *, memory: Memory = ...
) -> QuantizedModule: ...
@overload
def quantize(
    model: "nnx.Module", recipe: Recipe | str | AqtConfiguration = ..., *, memory: Memory = ...
) -> "QuantizedNNX": ...
@overload
def quantize(
    model: Callable[..., Any],
    recipe: Recipe | str | AqtConfiguration = ...,
    *,
    memory: Memory = ...,
) -> QuantizedFunction: ...
def quantize(
    model: Any, recipe: Recipe | str | AqtConfiguration = "int8", *, memory: Memory = "values"
) -> Any:
    """Return a model whose convolutions and dense layers multiply int8 codes.

    The given model is not changed: its computation is traced when the quantized model is called,
    and evaluated with quantized products. The parameter tree stays the same.

    Args:
        model: A Flax module (Linen or NNX), an Equinox module, or a function of
            (params, *inputs).
        recipe: A `Recipe`, the name of a preset (`Recipe.preset`), or an AQT configuration
            (`aqt.from_aqt`).
        memory: What a training step keeps of quantized tensors for its backward pass: 'values',
            as in float, or 'codes', a quarter of it. With 'codes' the operations between quantized
            tensors are computed again in the backward pass; the gradients are the same. It takes
            effect where the compiler schedules by memory, on GPUs and TPUs.

    Returns:
        For a Linen module, an object with Linen's `init` and `apply` (`QuantizedModule`). For an
        NNX module, an NNX module with a copy of it (`QuantizedNNX`). For a function, an object
        with the same `apply` as Linen's (`QuantizedFunction`). For an Equinox module, likewise
        (`QuantizedEquinox`): its inputs are batches, over which the module is mapped.

    Raises:
        QuantizationError: The model is none of these, or quantized already; or there is no such
            `memory`.
        RecipeError: The recipe is none of these, or the AQT configuration has fields without an
            equivalent.
    """
    recipe = as_recipe(recipe)
    if memory not in get_args(Memory):
        raise QuantizationError(f"memory must be 'values' or 'codes', got {memory!r}.")
    if isinstance(model, QuantizedModel):
        raise QuantizationError(
            f"{type(model).__name__} is quantized already; pass the model that it was made from."
        )
    if isinstance(model, type):  # The metaclasses of NNX and Equinox would pass for modules.
        raise _no_model(model)
    if isinstance(model, nn.Module):
        return QuantizedModule(model, recipe, memory)
    if _is_of("flax.nnx", model):
        from jaxqat.quant._models.nnx import QuantizedNNX

        return QuantizedNNX(model, recipe, memory)
    if _is_of("equinox", model) and callable(model):
        return QuantizedEquinox(model, recipe, memory)
    if callable(model):
        return QuantizedFunction(model, recipe, memory)
    raise _no_model(model)


def _no_model(value: Any) -> QuantizationError:
    return QuantizationError(
        "quantize takes a Flax module (Linen or NNX), an Equinox module or a function of "
        f"(params, *inputs), got {_described(value)}."
    )


def as_recipe(recipe: Any) -> Recipe:
    """Return the recipe that is given, named or configured by AQT."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return Recipe.preset(recipe)
    if is_configuration(recipe):
        return from_aqt(recipe)
    raise RecipeError(
        "recipe must be a jaxqat.Recipe, the name of a preset such as 'int8' or an AQT "
        "configuration, got "
        f"{_described(recipe)}; for other bits, pass Recipe(weight_bits=4, act_bits=8)."
    )


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} (pass an instance of it)"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int) else type(value).__name__


def _is_of(package: str, model: Any) -> bool:
    """Whether a class of the model comes from a package, without importing the package."""
    modules = {base.__module__ for base in type(model).__mro__}
    return any(name == package or name.startswith(f"{package}.") for name in modules)
