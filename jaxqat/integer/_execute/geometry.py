"""Windows, convolutions and indices of nodes, in the terms of JAX."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxqat.integer import graph as g
from jaxqat.quant._numerics import windows


def taken(x: Array, axis: int, indices: Sequence[int]) -> Array:
    """Return the elements at indices along an axis; equal repetitions are a broadcast."""
    times = len(indices) // x.shape[axis]
    repeated = np.repeat(np.arange(x.shape[axis]), times)
    if np.array_equal(indices, repeated):
        return jnp.repeat(x, times, axis)
    return jnp.take(x, np.asarray(indices), axis, mode="clip")


def is_depthwise(node: g.Product) -> bool:
    """Return whether each input channel has its own filters (a depthwise convolution)."""
    return node.groups > 1 and node.weights.shape[-2] == 1


def convolve(
    node: g.Product,
    codes: Array,
    weights: Array,
    kernel_layout: str = "io",
    groups: int | None = None,
) -> Int[Array, "..."]:
    """Return an s8 x s8 -> s32 convolution, padded with 0.

    Args:
        node: Product that defines the geometry.
        codes: (batch, spatial..., channels).
        weights: int8.
        kernel_layout: 'io' for (*window, inputs, outputs), 'o_i' for (outputs, *window, inputs).
        groups: Channel groups, if they are not the node's.
    """
    spatial = "DHW"[3 - (codes.ndim - 2) :]
    kernel = f"{spatial}IO" if kernel_layout == "io" else f"O{spatial}I"
    return lax.conv_general_dilated(
        codes,
        weights,
        node.strides,
        node.padding,
        rhs_dilation=node.dilation,
        dimension_numbers=(f"N{spatial}C", kernel, f"N{spatial}C"),
        feature_group_count=groups or node.groups,
        preferred_element_type=jnp.int32,
    )


def tap_sums(node: g.Product, shape: tuple[int, ...]) -> Any:
    """Return the int32 sums of the weight codes inside of the tensor, by output position."""
    image = np.pad(np.ones(shape[:-1], np.int32), node.padding)
    total: Any = 0
    image = image[None, ..., None]
    for tap, inside in windows.windows(image, node.window, node.strides, node.dilation):
        total = total + inside[0] * node.weights[tap].astype(np.int32).sum(-2)
    return total


def pool_window(node: g.SumPool | g.MaxPool) -> tuple[Any, ...]:
    """Return the window, strides and padding of a pool for `lax.reduce_window`."""
    padding = ((0, 0), *node.padding, (0, 0))
    return (1, *node.window, 1), (1, *node.strides, 1), padding
