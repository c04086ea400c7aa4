"""Post-training quantization: ranges from a few batches, and no training."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxqat.errors import QuantizationError
from jaxqat.quant._trace.arguments import split_arrays
from jaxqat.quant.models.function import QuantizedFunction, flatten
from jaxqat.quant.models.linen import COLLECTION, QuantizedModule, quantize
from jaxqat.quant.recipe import Recipe


def calibrate(
    model: Any, variables: Any, batches: Iterable[Any], recipe: Recipe | str = "int8", **kwargs: Any
) -> tuple[Any, ...]:
    """A quantized model with ranges observed on data (Krishnamoorthi 2018, arXiv:1806.08342, 3.1).

        model, variables = jaxqat.calibrate(module, variables, batches, train=False)
        graph = jaxqat.convert(model, variables, images, train=False)

    Args:
        model: What `jaxqat.quantize` takes.
        variables: Its variables; of a function, its parameters; None for an NNX module, which
            holds them itself.
        batches: Inputs of the model, a batch each; a tuple holds several arguments.
        recipe: A `Recipe`, or the name of a preset.
        **kwargs: As for the model's `apply`; they say, as `train=False` does, that it is inference.

    Returns:
        The quantized model and the arguments that stand before its inputs: of a Linen module its
        variables with ranges, of a function its parameters and ranges, of an NNX module none.

    Raises:
        QuantizationError: There is no batch, or what it makes of a tensor is not finite.
    """
    quantized = quantize(model, recipe)
    state = (variables,)[: quantized.state_arguments]
    observe = _observer(quantized, state, kwargs)
    ranges: Any = None
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        if ranges is None:
            ranges = quantized.init_ranges(*state, *inputs, **kwargs)
        ranges = observe(ranges, inputs)
    if ranges is None:
        raise QuantizationError(
            "There is no batch to calibrate with: `batches` is empty; a few batches of inputs are "
            "needed."
        )
    _check_finite(ranges)
    if isinstance(quantized, QuantizedModule):
        return quantized, {**variables, COLLECTION: ranges}
    if isinstance(quantized, QuantizedFunction):
        return quantized, variables, ranges
    return (quantized,)


def _observer(quantized: Any, state: tuple[Any, ...], kwargs: Any) -> Any:
    """A function of ranges and inputs: the ranges after them."""

    @jax.jit
    def observe_module(ranges: Any, inputs: Any) -> Any:
        copy = quantized.with_ranges(ranges)
        copy.calibrate(*inputs, **kwargs)
        return copy.all_ranges()

    def in_place(ranges: Any, inputs: Any) -> Any:
        quantized.set_ranges(observe_module(ranges, inputs))
        return quantized.all_ranges()

    arrays, make_state = split_arrays(state)

    @jax.jit
    def observe(arrays: Any, ranges: Any, inputs: Any) -> Any:
        state = make_state(arrays)
        if isinstance(quantized, QuantizedModule):
            return quantized.calibrate({**state[0], COLLECTION: ranges}, *inputs, **kwargs)
        return quantized.calibrate(*state, ranges, *inputs, **kwargs)

    if not state:  # A module that holds its state itself.
        return in_place
    return lambda ranges, inputs: observe(arrays, ranges, inputs)


def _check_finite(ranges: Any) -> None:
    wrong = [
        "/".join(key)
        for key, state in flatten(ranges).items()
        if not all(np.isfinite(np.asarray(value)).all() for value in state.values())
    ]
    if wrong:
        raise QuantizationError(
            f"The values of {', '.join(wrong)} are not finite on these batches (NaN or infinite); "
            "no range can be made of them."
        )
