"""Post-training quantization: ranges from a few batches, and no training."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxqat.quant.flax import COLLECTION, QuantizedModule, quantize
from jaxqat.quant.recipe import Recipe
from jaxqat.quant.trace import QuantizationError
from jaxqat.quant.transform import QuantizedFunction, flatten, split_arrays


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
    ranges: Any = None
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        if isinstance(quantized, QuantizedModule | QuantizedFunction):
            if ranges is None:
                ranges = _first_ranges(quantized, variables, inputs, kwargs)
                observe = _compiled(quantized, variables, kwargs)
            ranges = observe(ranges, inputs)
        else:
            quantized.calibrate(*inputs, **kwargs)
            ranges = quantized.ranges.get_value()
    if ranges is None:
        raise QuantizationError(
            "There is no batch to calibrate with: `batches` is empty; a few batches of inputs are "
            "needed."
        )
    _check_finite(ranges)
    if isinstance(quantized, QuantizedModule):
        return quantized, {**variables, COLLECTION: ranges}
    return (
        (quantized, variables, ranges) if isinstance(quantized, QuantizedFunction) else (quantized,)
    )


def _first_ranges(quantized: Any, variables: Any, inputs: Any, kwargs: Any) -> Any:
    return quantized.init_ranges(variables, *inputs, **kwargs)


def _compiled(quantized: Any, variables: Any, kwargs: Any) -> Any:
    """Ranges and inputs to the ranges after them."""
    arrays, make_variables = split_arrays(variables)

    @jax.jit
    def observe(arrays: Any, ranges: Any, inputs: Any) -> Any:
        variables = make_variables(arrays)
        if isinstance(quantized, QuantizedModule):
            return quantized.calibrate({**variables, COLLECTION: ranges}, *inputs, **kwargs)
        return quantized.calibrate(variables, ranges, *inputs, **kwargs)

    return lambda ranges, inputs: observe(arrays, ranges, inputs)


def _check_finite(ranges: Any) -> None:
    wrong = [
        "/".join(key)
        for key, state in flatten(ranges).items()
        if not np.isfinite([float(state["min"]), float(state["max"])]).all()
    ]
    if wrong:
        raise QuantizationError(
            f"The values of {', '.join(wrong)} are not finite on these batches (NaN or infinite); "
            "no range can be made of them."
        )
