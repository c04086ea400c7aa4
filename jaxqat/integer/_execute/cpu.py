"""Execution on a CPU, with u8 x s8 dots for all products.

x86 processors multiply u8 by s8 (VNNI), not s8 by s8. Codes are stored as u8: code + 128, or the
code itself if it is never negative. After a ReLU the stored real zero is then 0 in both recipes, so
the bias needs no correction for the zero point. A convolution is a dot over gathered windows. The
batch is split into chunks that fit the cache.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from jaxtyping import Array, Int

from jaxqat.integer import graph as g
from jaxqat.integer._execute.base import Platform
from jaxqat.integer._execute.geometry import is_depthwise
from jaxqat.quant._numerics.windows import taps, windows

CHUNK = 8
# Limit on the operands of a concatenation, because compilation time grows faster than their number:
# 1 s for 100, 26 s for 800.
MAX_PIECES = 128
# float32 holds sums of as many products of codes less zero points, below 2**24 in all.
MAX_PAIRS = 2**24 // 256**2


class Cpu(Platform):
    """Compute products as u8 x s8 dots, and batches in chunks."""

    # By default, LLVM uses half of the width of the vector registers.
    compiler_options: ClassVar[dict[str, Any] | None] = {"xla_cpu_prefer_vector_width": "512"}
    stored_type: ClassVar[Any] = jnp.uint8

    def offset(self, tensor: g.Tensor) -> int:
        """Return 0 if no code is negative, else 128."""
        return 0 if tensor.low >= 0 and tensor.zero_point >= 0 else 128

    def pads_with_zero_point(self, node: g.Product) -> bool:
        """Return True for convolutions: gathering windows needs padded codes anyway."""
        return node.kind == "conv"

    def prepare(self, node: g.Product) -> dict[str, np.ndarray]:
        """Return convolution weights as a matrix (window and a group's inputs, outputs)."""
        arrays = super().prepare(node)
        if node.kind == "conv" and not is_depthwise(node):
            arrays["weights"] = node.weights.reshape(-1, node.channels)
        return arrays

    def accumulate(
        self, node: g.Product, arrays: dict[str, Array], codes: Array
    ) -> Int[Array, "..."]:
        """Return the int32 accumulator of a product, with its bias."""
        if node.kind == "dense" or is_depthwise(node):
            return super().accumulate(node, arrays, codes)
        padded = self.padded(node, codes)
        if node.groups == 1:
            return self.dot(gather_windows(node, padded), arrays["weights"]) + arrays["bias"]
        parts = []
        weights = jnp.split(arrays["weights"], node.groups, axis=-1)
        split = [jnp.split(window, node.groups, axis=-1) for _, window in _windows(node, padded)]
        for group, matrix in enumerate(weights):
            parts.append(self.dot(jnp.concatenate([c[group] for c in split], -1), matrix))
        return jnp.concatenate(parts, -1) + arrays["bias"]

    def sums_of_pairs(self, node: g.MatMul, left: Array, right: Array) -> Int[Array, "..."]:
        """Return sum((q_1 - z_1) (q_2 - z_2)) of stored matrices, int32: exact float32 sums."""
        x, y = (
            self.units(name, stored).astype(jnp.float32)
            for name, stored in zip(node.inputs, (left, right), strict=True)
        )
        total: Any = 0
        for start in range(0, x.shape[-1], MAX_PAIRS):
            part = slice(start, start + MAX_PAIRS)
            sums = jnp.matmul(x[..., part], y[..., part, :], precision=lax.Precision.HIGHEST)
            total = total + sums.astype(jnp.int32)
        return total

    def batched(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Evaluate a function in chunks of the batch that fit the cache."""
        return lambda arrays: in_chunks(function, arrays)

    def dot(self, codes: Array, weights: Array) -> Int[Array, "..."]:
        """Return int32 sums over the last axis of the codes."""
        rows = codes.reshape(-1, codes.shape[-1])
        return mixed_dot(rows, weights).reshape(*codes.shape[:-1], weights.shape[-1])


def gather_windows(node: g.Product, padded: Array) -> Array:
    """Return the codes in the window of each position: (batch, spatial..., window and inputs).

    Each row of a window is contiguous in memory, so whole rows are copied. Copying tap by tap, one
    pixel at a time, takes twice the time.
    """
    *_, width, channels = padded.shape
    positions = (width - node.window[-1]) // node.strides[-1] + 1
    pieces = positions * math.prod(node.window[:-1])
    if math.prod(node.window) == 1 or node.dilation[-1] > 1 or pieces > MAX_PIECES:
        columns = [window for _, window in _windows(node, padded)]
        return jnp.concatenate(columns, -1) if len(columns) > 1 else columns[0]
    stride, length = node.strides[-1] * channels, node.window[-1] * channels
    lines = padded.reshape(*padded.shape[:-2], width * channels)
    slices = taps(padded.shape[1:-2], node.window[:-1], node.strides[:-1], node.dilation[:-1])
    read = [lines[(slice(None), *window)] for _, window in slices]
    starts = range(0, positions * stride, stride)
    rows = jnp.concatenate([line[..., x : x + length] for x in starts for line in read], -1)
    return rows.reshape(*rows.shape[:-1], positions, len(read) * length)


def _windows(node: g.Product, padded: Array) -> Iterator[tuple[tuple[int, ...], Array]]:
    return windows(padded, node.window, node.strides, node.dilation)


def in_chunks(function: Any, arrays: Any, chunk: int = CHUNK) -> Any:
    """Evaluate a function of a batch, of one array or more, in chunks; concatenate the results.

    The last chunk is filled up with zeros: a smaller one would be a second program to compile.
    """
    batch = jax.tree.leaves(arrays)[0].shape[0]
    # A symbolic batch (jax.export) cannot be split.
    if not isinstance(batch, int) or batch <= chunk:
        return function(arrays)
    missing = -batch % chunk

    def split(x: Array) -> Array:
        filled = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(-1, chunk, *x.shape[1:])

    parts = lax.map(function, jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:batch], parts)


_mixed_dot = Primitive("mixed_dot")


def mixed_dot(codes: Array, weights: Array) -> Int[Array, "n o"]:
    """Multiply (n, k) u8 by (k, o) s8 to (n, o) s32.

    `lax.dot_general` would convert both operands to s32 first; the StableHLO operation does not.
    """
    return _mixed_dot.bind(codes, weights)


def _lower(context: Any, codes: Any, weights: Any) -> list[Any]:
    numbers = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=[],
        rhs_batching_dimensions=[],
        lhs_contracting_dimensions=[1],
        rhs_contracting_dimensions=[0],
    )
    sizes = [ir.RankedTensorType(x.type).shape for x in (codes, weights)]
    kind = ir.RankedTensorType.get([sizes[0][0], sizes[1][1]], ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(kind, codes, weights, numbers)]


_mixed_dot.def_impl(lambda *operands: jax.jit(mixed_dot)(*operands))
_mixed_dot.def_abstract_eval(
    lambda codes, weights: core.ShapedArray((codes.shape[0], weights.shape[1]), jnp.int32)
)
mlir.register_lowering(_mixed_dot, _lower)
