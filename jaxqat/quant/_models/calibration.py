# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`jaxqat.calibrate`: post-training quantization, ranges from a few batches without training."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxqat.errors import QuantizationError
from jaxqat.quant._models.batches import as_arguments, compiled, each_batch, preparing
from jaxqat.quant._models.bound import BoundModel, QuantizedModel
from jaxqat.quant._models.quantize import quantize
from jaxqat.quant._models.state import check_finite
from jaxqat.quant._numerics.ranges import Range
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant.recipe import Recipe


def calibrate(
    model: Any,
    *state: Any,
    batches: Iterable[Any],
    recipe: Recipe | str | None = None,
    preprocess: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> BoundModel:
    """Return a quantized model with ranges observed on data, bound to its variables.

    Post-training quantization (Krishnamoorthi 2018, arXiv:1806.08342, section 3.1), and the start
    of quantization-aware training. Ranges that the variables hold already are not used; the
    method `calibrate` of a model goes on from them, batch by batch.

        network = jaxqat.calibrate(module, variables, batches=batches, train=False)
        graph = jaxqat.convert(network, images)

    Args:
        model: What `jaxqat.quantize` takes or returned.
        *state: The model's variables: a dictionary with `params`. Nothing for an NNX or an Equinox
            module, which hold them.
        batches: Inputs of the model, one batch each; a tuple holds several arguments. Those that
            are no arrays are static.
        recipe: A `Recipe`, or the name of a preset; 'int8' by default. Only for a model that is
            not quantized yet.
        preprocess: Makes the model's input from a batch, compiled together with the model; None
            if the batches are the input.
        **kwargs: Keyword arguments of the model's call, the same for all batches, such as
            `train=False` for inference.

    Returns:
        The bound model. Its `variables` hold the ranges; `model` is the quantized model itself.

    Raises:
        QuantizationError: There is no batch, `batches` is one array, or the values of a tensor are
            not finite.
        RecipeError: The recipe does not fit the model, or there is no such preset.
    """
    quantized = _quantized(model, recipe)
    bound = quantized.bind(*state, **kwargs)
    arrays, rebuild = bound.split_arrays()

    prepare = preparing(preprocess)

    @compiled
    def observe(arrays: Any, ranges: dict[Key, Range], inputs: tuple[Any, ...]) -> dict[Key, Range]:
        return rebuild(arrays).with_state(ranges).calibrate(*prepare(inputs)).state

    ranges: dict[Key, Range] | None = None
    for batch in each_batch(batches):
        inputs = as_arguments(batch)
        if ranges is None:
            shapes = inputs if preprocess is None else jax.eval_shape(prepare, inputs)
            start = bound.with_empty_ranges(*shapes).state
            ranges = jax.tree.map(_strongly_typed, start)
        ranges = observe(arrays, ranges, inputs)
    if ranges is None:
        raise QuantizationError(
            "There is no batch to calibrate with: `batches` is empty; pass a few batches of inputs."
        )
    check_finite(ranges)
    return quantized.with_calibrated(bound.with_state(ranges))


def _strongly_typed(leaf: jax.Array) -> jax.Array:
    # As a jitted function returns its results: called with these, it compiles once.
    return jnp.array(leaf, leaf.dtype)


def _quantized(model: Any, recipe: Recipe | str | None) -> QuantizedModel:
    if not isinstance(model, QuantizedModel):
        return quantize(model, "int8" if recipe is None else recipe)
    if recipe is not None:
        raise QuantizationError(
            "The model is quantized already; pass either a quantized model or a recipe."
        )
    return model
