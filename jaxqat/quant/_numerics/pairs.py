"""Integer products of two activations, as in attention."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int8

from jaxqat.quant._numerics import injection
from jaxqat.quant._numerics.activations import dequantize
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._numerics.products import Dot, backward
from jaxqat.quant._numerics.promotion import default_promotion


class Quantized(NamedTuple):
    """A quantized tensor: dequantized values, which have the gradient, codes and grid."""

    values: Any
    codes: Any
    grid: Any


class PairResult(NamedTuple):
    """Result of a product of two activations: the real one, which has the gradients, and its sums.

    Attributes:
        real: s_1 s_2 total.
        total: sum((q - z_1) (k - z_2)), int32.
    """

    real: Array
    total: Int[Array, "..."]


MOST_TERMS = (2**31 - 1) // 255**2
"""So many products of two codes, each less its zero point, have a sum that int32 holds."""


def terms(dot: Dot, q: Int8[Array, "..."]) -> int:
    """Return how many products each sum has.

    Args:
        dot: The product.
        q: Codes of the left operand.
    """
    return math.prod(q.shape[axis] for axis in dot.params["dimension_numbers"][0][0])


def sums(
    dot: Dot, q: Int8[Array, "..."], left: Grid, k: Int8[Array, "..."], right: Grid
) -> Int[Array, "..."]:
    """Return sum((q - z_1) (k - z_2)) of two tensors of codes, int32.

    It is sum(q k) - z_1 sum(k) - z_2 sum(q) + n z_1 z_2, sums over n pairs (Jacob et al. 2018,
    arXiv:1712.05877, equation 7).

    Args:
        dot: The product, whose `weight_side` is 1.
        q: Codes of the left operand.
        left: Their grid.
        k: Codes of the right operand.
        right: Their grid.
    """
    numbers = dot.params["dimension_numbers"]
    total, sides = injection.dot_general_of_codes(q, k, numbers), numbers[0]
    if right.zero_point is not None:
        of_left = jnp.sum(q.astype(jnp.int32), axis=sides[0], keepdims=True)
        total = total - right.zero_point * dot.data_over_output(of_left)
    if left.zero_point is not None:
        total = total - left.zero_point * dot.zero_sums(q.shape, k)
    if left.zero_point is not None and right.zero_point is not None:
        total = total + left.zero_point * right.zero_point * terms(dot, q)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply(dot: Dot, dtype: Any, left: Quantized, right: Quantized) -> PairResult:
    """Multiply two quantized activations, with the gradients of the float dot.

    y = s_1 s_2 sum((q - z_1) (k - z_2)), with the sums of `sums`.

    Args:
        dot: The product, whose `weight_side` is 1.
        dtype: Type of the result.
        left: The left operand.
        right: The right operand.
    """
    return _forward(dot, dtype, left, right)[0]


@default_promotion
def _forward(dot, dtype, left, right):
    (x, q, s), (y, k, t) = left, right
    total = sums(dot, q, s, k, t)
    real = (total.astype(jnp.float32) * (s.scale * t.scale)).astype(dtype)
    return PairResult(real, total), (q, s, x[..., :0], k, t, y[..., :0])


@default_promotion
def _backward(dot, dtype, residuals, gradients):
    del dtype
    q, s, x_like, k, t, y_like = residuals
    x, y = dequantize(q, s, x_like.dtype), dequantize(k, t, y_like.dtype)
    of_x, of_y = backward(dot, x, y, gradients.real)
    return Quantized(of_x, None, None), Quantized(of_y, None, None)


multiply.defvjp(_forward, _backward)
