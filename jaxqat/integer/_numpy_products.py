"""A graph's products of codes in NumPy, which compilers and runtimes are compared with."""

import numpy as np
from jaxtyping import Float32, Int8, Int64

from jaxqat.integer._nodes.base import Tensor
from jaxqat.integer._nodes.mat_mul import MatMul
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


def sums_of_pairs(node: MatMul, left: np.ndarray, right: np.ndarray) -> Int64[np.ndarray, "..."]:
    """Return the sums of products of two tensors of integers.

    Args:
        node: The product.
        left: Integers, (batch, ...).
        right: Integers, (batch, ...).
    """
    matrices: list[np.ndarray] = []
    for side, x in enumerate((left, right)):
        ordered = x.astype(np.float64).transpose(node.as_matrices(side, x.ndim))
        common = ordered.shape[: len(node.batched[0])]
        matrices.append(ordered.reshape(*common, *node.matrix_size(side, x.shape)))
    total = np.matmul(*matrices).astype(np.int64)
    return total.reshape(*total.shape[:-2], *node.free_sizes([left.shape, right.shape]))


def codes(
    node: Product | MatMul, total: Int64[np.ndarray, "..."], out: Tensor
) -> Int8[np.ndarray, "..."]:
    """Return clip(round((acc + bias) * multiplier) + zero_point, low, high)."""
    units = np.round(real(node, total)).astype(np.int64) + out.zero_point
    return np.clip(units, out.low, out.high).astype(np.int8)


def real(node: Product | MatMul, total: Int64[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Return (acc + bias) * multiplier, in float32; a product of two tensors has no bias."""
    bias = node.bias if isinstance(node, Product) else 0
    return (total + bias).astype(np.float32) * node.multiplier
