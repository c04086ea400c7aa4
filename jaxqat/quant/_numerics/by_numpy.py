"""The products of codes in NumPy, which compilers and runtimes are compared with.

Sums are computed in float64. It holds every integer up to 2**53, and no sum of codes leaves int32,
so they are exact in any order. No compiler of JAX takes part.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from jaxqat.quant._numerics.products import AnyProduct, Convolution, Dot
from jaxqat.quant._numerics.windows import taps

Pairs = Sequence[tuple[int, int]]


def accumulate(
    product: AnyProduct, codes: np.ndarray, weights: np.ndarray
) -> Int64[np.ndarray, "..."]:
    """Return the sums of code products, as `AnyProduct.accumulate` does.

    Args:
        product: A convolution or a dot.
        codes: Of the activations.
        weights: Their codes.
    """
    if isinstance(product, Dot):
        return _dot(product, codes.astype(np.float64), weights.astype(np.float64))
    assert isinstance(product, Convolution)
    params = product.params
    lhs, rhs, out = params["dimension_numbers"]
    x = np.transpose(codes, (lhs[0], *lhs[2:], lhs[1]))
    w = np.transpose(weights, (*rhs[2:], rhs[1], rhs[0]))
    total = convolve(
        _dilated(x, params["lhs_dilation"]),
        w,
        strides=params["window_strides"],
        padding=params["padding"],
        dilation=params["rhs_dilation"],
        groups=params["feature_group_count"],
    )
    return np.moveaxis(total, range(total.ndim), (out[0], *out[2:], out[1]))


def convolve(
    values: np.ndarray,
    weights: np.ndarray,
    *,
    strides: Sequence[int],
    padding: Pairs,
    dilation: Sequence[int],
    groups: int,
) -> Int64[np.ndarray, "..."]:
    """Return a convolution of integers, exactly; borders hold 0.

    Args:
        values: Integers, (batch, *spatial, channels).
        weights: Integers, (*window, inputs of a group, outputs).
        strides: Of the window, in each spatial axis.
        padding: Numbers of zeros before and after each spatial axis; negative ones crop it.
        dilation: Of the window, in each spatial axis.
        groups: Of channels.
    """
    x, w = _padded(values.astype(np.float64), padding), weights.astype(np.float64)
    total: np.ndarray | float = 0.0
    for tap, index in taps(x.shape[1:-1], w.shape[:-2], tuple(strides), tuple(dilation)):
        total = total + _by_group(x[(slice(None), *index)], w[tap], groups)
    return np.asarray(total).astype(np.int64)


def _dot(product: Dot, x: np.ndarray, weights: np.ndarray) -> Int64[np.ndarray, "..."]:
    """Return a dot; its result has the batch axes first, then the free ones of both sides."""
    left, right = (weights, x) if product.weight_side == 0 else (x, weights)
    summed, batch = product.params["dimension_numbers"]
    ordered = []
    for side, operand in enumerate((left, right)):
        free = [a for a in range(operand.ndim) if a not in (*batch[side], *summed[side])]
        axes = (*batch[side], *free, *summed[side])
        sizes = [[operand.shape[a] for a in each] for each in (batch[side], free, summed[side])]
        rows, columns = (int(np.prod(s)) for s in sizes[1:])
        matrices = np.transpose(operand, axes).reshape(*sizes[0], rows, columns)
        ordered.append((matrices, sizes))
    (a, sizes), (b, others) = ordered
    total = a @ np.swapaxes(b, -1, -2)
    return total.reshape(*sizes[0], *sizes[1], *others[1]).astype(np.int64)


def _dilated(x: np.ndarray, dilation: Sequence[int]) -> np.ndarray:
    """Return a tensor with zeros between its spatial elements."""
    if all(d == 1 for d in dilation):
        return x
    sizes = [(n - 1) * d + 1 for n, d in zip(x.shape[1:-1], dilation, strict=True)]
    result = np.zeros((len(x), *sizes, x.shape[-1]), x.dtype)
    result[(slice(None), *(slice(None, None, d) for d in dilation))] = x
    return result


def _padded(x: np.ndarray, padding: Pairs) -> np.ndarray:
    """Return values with zeros at the borders; negative padding crops them."""
    added = [(max(low, 0), max(high, 0)) for low, high in padding]
    kept = (slice(max(-low, 0), min(high, 0) or None) for low, high in padding)
    return np.pad(x, [(0, 0), *added, (0, 0)])[(slice(None), *kept)]


def _by_group(x: np.ndarray, weights: np.ndarray, groups: int) -> np.ndarray:
    """Return the products of each group's channels with its weights, one tap of the window."""
    inputs, outputs = weights.shape
    rows = np.moveaxis(x.reshape(*x.shape[:-1], groups, inputs), -2, 0).reshape(groups, -1, inputs)
    matrices = weights.reshape(inputs, groups, outputs // groups).transpose(1, 0, 2)
    return np.moveaxis(rows @ matrices, 0, 1).reshape(*x.shape[:-1], outputs)
