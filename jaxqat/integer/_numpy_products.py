"""A graph's products of codes in NumPy, which compilers and runtimes are compared with."""

import numpy as np
from jaxtyping import Float32, Int8, Int64

from jaxqat.integer._nodes.base import Tensor
from jaxqat.integer._nodes.product import Product
from jaxqat.quant._numerics.by_numpy import convolve


def sums(node: Product, values: np.ndarray) -> Int64[np.ndarray, "..."]:
    """Return sum(value * w), where borders hold 0: with values q - z, the accumulator.

    Args:
        node: A convolution or a dense layer.
        values: Integers, (batch, *spatial, channels).
    """
    if node.kind == "dense":
        return (values.astype(np.float64) @ node.weights.astype(np.float64)).astype(np.int64)
    return convolve(
        values,
        node.weights,
        strides=node.strides,
        padding=node.padding,
        dilation=node.dilation,
        groups=node.groups,
    )


def codes(node: Product, total: Int64[np.ndarray, "..."], out: Tensor) -> Int8[np.ndarray, "..."]:
    """Return clip(round((acc + bias) * multiplier) + zero_point, low, high)."""
    units = np.round(real(node, total)).astype(np.int64) + out.zero_point
    return np.clip(units, out.low, out.high).astype(np.int8)


def real(node: Product, total: Int64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Return (acc + bias) * multiplier, in float32."""
    return (total + node.bias).astype(np.float32) * node.multiplier
