"""A quantizer that shares nothing with jaxqat: a Linen network in float, with rounded tensors.

The input of each convolution and dense layer is rounded to the 8-bit grid of its range, and each
weight to the symmetric grid of its output channel (Krishnamoorthi 2018, arXiv:1806.08342, sections
2.1 and 3.1). Of all else, only the outputs of modules that are named are rounded.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from architectures.networks import fast_jit

LAYERS = (nn.Conv, nn.Dense)
Change = Callable[[str, Any], Any]
Function = Callable[[Any, Any], Any]  # Of variables and images.


def changing(change: Change, outputs: str) -> Any:
    """Return an interceptor that gives each layer `change(name, input)` as its input.

    Args:
        change: Of a name and a tensor. The name has the path of the module and, as it may be called
            more than once, the number of the call.
        outputs: Pattern of the paths of modules whose output is changed, too.
    """
    calls: dict[str, int] = {}

    def interceptor(call, args, kwargs, context):
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(context.module.path)
        calls[path] = calls.get(path, 0) + 1
        name = f"{path}:{calls[path]}"
        if isinstance(context.module, LAYERS):
            args = (change(f"{name}:input", args[0]), *args[1:])
        result = call(*args, **kwargs)
        return change(f"{name}:output", result) if re.fullmatch(outputs, path) else result

    return nn.intercept_methods(interceptor)


def grid(low: float, high: float, symmetric: bool) -> tuple[float, int, int]:
    """Return scale, zero point and smallest code."""
    if symmetric:
        return max(-low, high) / 127, 0, -127
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    return scale, round(-128 - low / scale), -128


def rounded(x: Any, scale: Any, zero: Any, bottom: Any) -> Any:
    """Return x on an 8-bit grid."""
    return (jnp.clip(jnp.round(x / scale) + zero, bottom, 127) - zero) * scale


def with_rounded_weights(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables with each kernel on the grids of its output channels."""

    def change(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        scale = jnp.abs(leaf).max(tuple(range(leaf.ndim - 1))) / 127
        return jnp.round(leaf / scale) * scale

    params = jax.tree_util.tree_map_with_path(change, variables["params"])
    return {**variables, "params": params}


class Quantizer:
    """A network whose tensors were observed on batches, as both presets quantize it.

    Attributes:
        ranges: The mean, over batches, of the smallest and of the largest value of each tensor.
    """

    def __init__(
        self,
        function: Function,
        variables: Mapping[str, Any],
        batches: Sequence[np.ndarray],
        outputs: str,
    ):
        @fast_jit
        def ends(variables, images):
            found = {}

            def note(name, x):
                found[name] = jnp.stack([x.min(), x.max()])
                return x

            with changing(note, outputs):
                function(variables, images)
            return found

        @fast_jit
        def network(variables, images, grids):
            with changing(lambda name, x: rounded(x, *grids[name]), outputs):
                return function(variables, images)

        found = [ends(variables, images) for images in batches]
        self.ranges = {
            name: np.mean([np.float64(batch[name]) for batch in found], axis=0) for name in found[0]
        }
        self._network, self._variables = network, with_rounded_weights(variables)

    def __call__(self, images: np.ndarray, *, symmetric: bool) -> Any:
        """Return the result of the quantized network."""
        grids = {
            name: grid(float(low), float(high), symmetric)
            for name, (low, high) in self.ranges.items()
        }
        return self._network(self._variables, images, grids)
