"""A quantizer that shares nothing with jaxqat: Flax's layers in float, with rounded operands.

The input of each convolution and dense layer is rounded to the 8-bit grid of its smallest and
largest value, and each weight to the symmetric grid of its output channel (Krishnamoorthi 2018,
arXiv:1806.08342, sections 2.1 and 3.1). Nothing else is quantized.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LAYERS = (nn.Conv, nn.Dense)


def of_inputs(change: Callable[[str, Any], Any]) -> Any:
    """Return an interceptor that gives each layer `change(name, input)` as its input.

    The name is the layer's path and, as a layer may be called more than once, the number of calls.
    """
    calls: dict[str, int] = {}

    def interceptor(call, args, kwargs, context):
        if not isinstance(context.module, LAYERS) or context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(context.module.path)
        calls[path] = calls.get(path, 0) + 1
        return call(change(f"{path}:{calls[path]}", args[0]), *args[1:], **kwargs)

    return nn.intercept_methods(interceptor)


def observed_ranges(
    function: Callable[[Any, Any], Any], variables: Any, batches: Sequence[np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest input of each layer over all batches."""

    @jax.jit
    def inputs(variables, images):
        found = {}
        with of_inputs(lambda name, x: found.setdefault(name, x)):
            function(variables, images)
        return {name: (x.min(), x.max()) for name, x in found.items()}

    ends = [jax.device_get(inputs(variables, images)) for images in batches]
    return {
        name: (min(float(e[name][0]) for e in ends), max(float(e[name][1]) for e in ends))
        for name in ends[0]
    }


def rounded(x: Any, low: float, high: float, symmetric: bool) -> Any:
    """Return x on the 8-bit grid of a range."""
    if symmetric:
        scale = max(-low, high) / 127
        return jnp.clip(jnp.round(x / scale), -127, 127) * scale
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = round(-128 - low / scale)
    return (jnp.clip(jnp.round(x / scale) + zero, -128, 127) - zero) * scale


def with_rounded_weights(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables with each kernel on the grids of its output channels."""

    def change(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        scale = jnp.abs(leaf).max(tuple(range(leaf.ndim - 1))) / 127
        return jnp.round(leaf / scale) * scale

    params = jax.tree_util.tree_map_with_path(change, variables["params"])
    return {**variables, "params": params}


def quantized(
    function: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    batches: Sequence[np.ndarray],
    *,
    symmetric: bool,
) -> tuple[Callable[[Any], Any], int]:
    """Return the quantized network, a function of images, and how many tensors it rounds.

    Args:
        function: A Linen network in inference, of variables and images.
        variables: Its variables.
        batches: Images that show the ranges.
        symmetric: Whether activations have the zero point 0.
    """
    ranges = observed_ranges(function, variables, batches)
    weights = with_rounded_weights(variables)

    @jax.jit
    def network(images):
        with of_inputs(lambda name, x: rounded(x, *ranges[name], symmetric)):
            return function(weights, images)

    return network, 2 * len(ranges)
