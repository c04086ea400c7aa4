"""Execution on a CPU: every product a u8 x s8 dot.

x86 processors multiply u8 by s8 (VNNI), not s8 by s8. Codes are stored as u8, code + 128 or, of a
tensor that is never negative, the code itself; behind a ReLU a real zero is then 0 in both recipes,
and no zero point is left to correct for. A convolution is a dot over gathered windows, in chunks of
the batch that fit the cache.
"""

import math
from collections.abc import Callable
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
from jaxqat.integer._execute.base import Platform, is_depthwise, taps, windows

CHUNK = 8
# Operands of a concatenation, whose compilation takes time that grows faster than they do: 1 s for
# 100, 26 s for 800.
MAX_PIECES = 128


class Cpu(Platform):
    """u8 x s8 dots, batches in chunks."""

    # Without it LLVM uses half of the vector registers' width.
    compiler_options: ClassVar[dict[str, Any] | None] = {"xla_cpu_prefer_vector_width": "512"}
    stored_type: ClassVar[Any] = jnp.uint8

    def offset(self, tensor: g.Tensor) -> int:
        """0 for codes from 0 on, else 128."""
        return 0 if tensor.low >= 0 and tensor.zero_point >= 0 else 128

    def pads_with_zero_point(self, node: g.Product) -> bool:
        """Always: gathering windows pads anyway."""
        return node.kind == "conv"

    def prepare(self, node: g.Product) -> dict[str, np.ndarray]:
        """Weights as one matrix (window and inputs, outputs) for each group."""
        own = super().prepare(node)
        if node.kind == "conv" and not is_depthwise(node):
            own["weights"] = node.weights.reshape(-1, node.channels)
        return own

    def accumulate(self, node: g.Product, own: dict[str, Array], codes: Array) -> Int[Array, "..."]:
        """The int32 accumulator of a product, its bias added."""
        if node.kind == "dense" or is_depthwise(node):
            return super().accumulate(node, own, codes)
        padded = self.padded(node, codes)
        if node.groups == 1:
            return self.dot(gathered(node, padded), own["weights"]) + own["bias"]
        parts = []
        weights = jnp.split(own["weights"], node.groups, axis=-1)
        split = [jnp.split(window, node.groups, axis=-1) for _, window in windows(node, padded)]
        for group, matrix in enumerate(weights):
            parts.append(self.dot(jnp.concatenate([c[group] for c in split], -1), matrix))
        return jnp.concatenate(parts, -1) + own["bias"]

    def batched(self, function: Callable[[Array], Any]) -> Callable[[Array], Any]:
        """In chunks that fit the cache."""
        return lambda images: in_chunks(function, images)

    def dot(self, codes: Array, weights: Array) -> Int[Array, "..."]:
        """Sums over the last axis of the codes, int32."""
        rows = codes.reshape(-1, codes.shape[-1])
        return mixed_dot(rows, weights).reshape(*codes.shape[:-1], weights.shape[-1])


def gathered(node: g.Product, padded: Array) -> Array:
    """For each output position, the codes in its window: (batch, spatial..., window and inputs).

    A row of a window lies in one piece in memory, and the rows of all windows are put one behind
    the other in a single pass: copying tap by tap, in pieces of one pixel, costs twice the time.
    """
    *_, width, channels = padded.shape
    positions = (width - node.window[-1]) // node.strides[-1] + 1
    few = positions * math.prod(node.window[:-1]) <= MAX_PIECES
    if math.prod(node.window) == 1 or node.dilation[-1] > 1 or not few:
        columns = [window for _, window in windows(node, padded)]
        return jnp.concatenate(columns, -1) if len(columns) > 1 else columns[0]
    step, length = node.strides[-1] * channels, node.window[-1] * channels
    lines = padded.reshape(*padded.shape[:-2], width * channels)
    slices = taps(padded.shape[1:-2], node.window[:-1], node.strides[:-1], node.dilation[:-1])
    met = [lines[(slice(None), *window)] for _, window in slices]
    starts = range(0, positions * step, step)
    rows = jnp.concatenate([line[..., x : x + length] for x in starts for line in met], -1)
    return rows.reshape(*rows.shape[:-1], positions, len(met) * length)


def in_chunks(function: Any, images: Array, chunk: int = CHUNK) -> Any:
    """A function of a batch, evaluated a chunk at a time; its results are put together."""
    batch = images.shape[0]
    # A symbolic batch (jax.export) cannot be cut.
    if not isinstance(batch, int) or batch <= chunk:
        return function(images)
    whole = batch // chunk * chunk
    parts = lax.map(function, images[:whole].reshape(-1, chunk, *images.shape[1:]))
    parts = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), parts)
    if whole == batch:
        return parts
    rest = function(images[whole:])
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), parts, rest)


_mixed_dot = Primitive("mixed_dot")


def mixed_dot(codes: Array, weights: Array) -> Int[Array, "n o"]:
    """(n, k) u8 by (k, o) s8 to (n, o) s32.

    `lax.dot_general` would convert both to s32 first; the StableHLO operation takes them as they
    are.
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
