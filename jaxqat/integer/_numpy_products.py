"""Products of codes in NumPy, which compilers and runtimes are compared with.

Sums are computed in float64. It holds every integer up to 2**53, and no sum of a graph leaves
int32, so they are exact in any order. No compiler of JAX takes part.
"""

import numpy as np
from jaxtyping import Float32, Int8, Int64

from jaxqat.integer._nodes.base import Tensor
from jaxqat.integer._nodes.product import Product
from jaxqat.quant._numerics.windows import taps


def sums(node: Product, values: np.ndarray) -> Int64[np.ndarray, "..."]:
    """Return sum(value * w), where borders hold 0: with values q - z, the accumulator.

    Args:
        node: A convolution or a dense layer.
        values: Integers, (batch, *spatial, channels).
    """
    x, weights = values.astype(np.float64), node.weights.astype(np.float64)
    if node.kind == "dense":
        return (x @ weights).astype(np.int64)
    padded = _padded(x, node)
    total: np.ndarray | float = 0.0
    for tap, index in taps(padded.shape[1:-1], node.window, node.strides, node.dilation):
        total = total + _by_group(padded[(slice(None), *index)], weights[tap], node.groups)
    return np.asarray(total).astype(np.int64)


def codes(node: Product, total: Int64[np.ndarray, "..."], out: Tensor) -> Int8[np.ndarray, "..."]:
    """Return clip(round((acc + bias) * multiplier) + zero_point, low, high)."""
    units = np.round(real(node, total)).astype(np.int64) + out.zero_point
    return np.clip(units, out.low, out.high).astype(np.int8)


def real(node: Product, total: Int64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Return (acc + bias) * multiplier, in float32."""
    return (total + node.bias).astype(np.float32) * node.multiplier


def _padded(x: np.ndarray, node: Product) -> np.ndarray:
    """Return values with zeros at the borders; negative padding crops them."""
    added = [(max(low, 0), max(high, 0)) for low, high in node.padding]
    kept = (slice(max(-low, 0), min(high, 0) or None) for low, high in node.padding)
    return np.pad(x, [(0, 0), *added, (0, 0)])[(slice(None), *kept)]


def _by_group(x: np.ndarray, weights: np.ndarray, groups: int) -> np.ndarray:
    """Return the products of each group's channels with its weights, one tap of the window."""
    inputs, outputs = weights.shape
    rows = np.moveaxis(x.reshape(*x.shape[:-1], groups, inputs), -2, 0).reshape(groups, -1, inputs)
    matrices = weights.reshape(inputs, groups, outputs // groups).transpose(1, 0, 2)
    return np.moveaxis(rows @ matrices, 0, 1).reshape(*x.shape[:-1], outputs)
