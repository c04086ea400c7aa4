"""Convolutions of codes over gathered windows, for devices without an exact s8 convolution.

Tensors are (batch, spatial..., channels) and padded; weights are (*window, inputs of a group,
outputs). Results of codes are int32.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int8

GATHERED = 2**26  # The most bytes of windows of codes at a time.


def taps(
    sizes: tuple[int, ...],
    window: tuple[int, ...],
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield the index of each tap of a sliding window, and the slices that it reads."""
    geometry = list(zip(sizes, window, strides, dilation, strict=True))
    extent = [(size - d * (length - 1) - 1) // s + 1 for size, length, s, d in geometry]
    for tap in np.ndindex(*window):
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        yield (
            tap,
            tuple(
                slice(start, start + stride * (n - 1) + 1, stride)
                for start, stride, n in zip(starts, strides, extent, strict=True)
            ),
        )


def windows(
    padded: Any, window: tuple[int, ...], strides: tuple[int, ...], dilation: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield the index of each tap, and the elements of the padded tensor that it reads."""
    for tap, slices in taps(padded.shape[1:-1], window, strides, dilation):
        yield tap, padded[(slice(None), *slices, slice(None))]


def depthwise(
    padded: Array,
    weights: Array,
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
    element_type: Any = jnp.int32,
) -> Array:
    """Return a depthwise convolution as an elementwise sum of shifted tensors times taps.

    It is computed and returned in `element_type`: a float type for the float convolution.

    Matrix units do not help without a reduction over channels, XLA's CPU backend has no fast s8
    kernel for it, and on CUDA the grouped s8 convolution has given wrong sums.
    """
    multiple = weights.shape[-1] // padded.shape[-1]
    total: Any = 0
    for tap, window in windows(padded, weights.shape[:-2], strides, dilation):
        window = window.astype(element_type)
        if multiple > 1:
            window = jnp.repeat(window, multiple, axis=-1)
        total = total + window * weights[tap].astype(element_type).reshape(-1)
    return total


def dot_over_windows_in_parts(
    padded: Int8[Array, "..."],
    weights: Int8[Array, "..."],
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Int[Array, "..."]:
    """Return a convolution without groups as s8 dots with s32 results.

    So many examples at a time that their windows take at most `GATHERED` bytes, but at least one.
    """
    product = functools.partial(
        dot_over_windows, weights=weights, strides=strides, dilation=dilation, groups=1
    )
    batch, outputs = padded.shape[0], weights.shape[-1]
    gathered = jax.eval_shape(product, padded).size // outputs * (weights.size // outputs)
    least = max(math.ceil(gathered / GATHERED), 1)
    parts = next((n for n in range(least, batch) if batch % n == 0), max(batch, 1))
    if parts == 1:
        return product(padded)
    sums = lax.map(product, padded.reshape(parts, batch // parts, *padded.shape[1:]))
    return sums.reshape(batch, *sums.shape[2:])


def dot_over_windows(
    padded: Int8[Array, "..."],
    weights: Int8[Array, "..."],
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Int[Array, "..."]:
    """Return a convolution as s8 dots with s32 results, one per channel group."""
    taken = windows(padded, weights.shape[:-2], strides, dilation)
    columns = jnp.stack([window for _, window in taken], -2)
    inputs = jnp.split(columns, groups, -1)
    outputs = jnp.split(weights, groups, -1)
    sums = [
        dot(lax.collapse(x, x.ndim - 2), lax.collapse(w, 0, w.ndim - 1))
        for x, w in zip(inputs, outputs, strict=True)
    ]
    return jnp.concatenate(sums, -1)


def dot(codes: Array, weights: Array) -> Int[Array, "..."]:
    """Return int32 sums of the codes' last axis times the weights' first."""
    axes = (((codes.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(codes, weights, axes, preferred_element_type=jnp.int32)
