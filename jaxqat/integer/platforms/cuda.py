"""Execution on NVIDIA GPUs: cuDNN's s8 convolutions, or Pallas kernels with the whole epilogue.

`Cuda` compiles from sm_75 on. cuDNN has no s8 convolution with an s32 result, only with float32,
which holds the sums exactly below 2**24: a layer that could exceed that is cut into groups of input
channels that cannot, whose sums are added as int32. `PallasCuda` (sm_80 on) never leaves int32 and
writes s8. `CudnnApproximate` uses cuDNN's own s8 output, with its one scale per tensor: an opt-in
whose codes differ.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxqat.integer import graph as g
from jaxqat.integer.platforms.base import Platform, convolve, is_depthwise

EXACT_FLOAT = 2**24


class Cuda(Platform):
    """cuDNN convolutions with float32 results that are exact."""

    def prepare(self, node: g.Product) -> dict[str, np.ndarray]:
        """Weights with the outputs first, which cuDNN takes without a transposition."""
        own = super().prepare(node)
        if node.kind == "conv" and not is_depthwise(node):
            own["weights"] = np.ascontiguousarray(np.moveaxis(node.weights, -1, 0))
        return own

    def accumulate(self, node: g.Product, own: dict[str, Array], codes: Array) -> Int[Array, "..."]:
        """The int32 accumulator of a product, its bias added."""
        if node.kind == "dense" or is_depthwise(node):
            return super().accumulate(node, own, codes)
        if node.groups == 1:
            return self._sums(node, own["weights"], codes) + own["bias"]
        # Grouped s8 convolutions have given wrong sums in cuDNN; each group is one of its own.
        split = zip(
            jnp.split(own["weights"], node.groups, axis=0),
            jnp.split(codes, node.groups, axis=-1),
            strict=True,
        )
        return jnp.concatenate([self._sums(node, w, c) for w, c in split], -1) + own["bias"]

    def _sums(self, node: g.Product, weights: Array, codes: Array) -> Int[Array, "..."]:
        total: Any = 0
        for start, stop in exact_groups(node):
            part = lax.slice_in_dim(codes, start, stop, axis=-1)
            own = lax.slice_in_dim(weights, start, stop, axis=-1)
            # Converted at once: cuDNN has no s32 output. The result is a whole number.
            sums = convolve(_ungrouped(node), part, own, "o_i").astype(jnp.float32)
            total = total + sums.astype(jnp.int32)
        return total


def exact_groups(node: g.Product) -> list[tuple[int, int]]:
    """Ranges of input channels whose sums stay below 2**24 whatever the codes are."""
    weights = np.abs(node.weights.astype(np.int64))
    by_input = weights.reshape(-1, *weights.shape[-2:]).sum(0).max(-1) * -g.CODE_MIN
    groups, start, total = [], 0, 0
    for channel, largest in enumerate(by_input):
        # cuDNN wants multiples of 4 channels, so a group ends at one.
        if channel % 4 == 0 and total + by_input[channel : channel + 4].sum() >= EXACT_FLOAT:
            groups.append((start, channel))
            start, total = channel, 0
        total += largest
    return [*groups, (start, len(by_input))]


def _ungrouped(node: g.Product) -> g.Product:
    return node if node.groups == 1 else dataclasses.replace(node, groups=1)


class CudnnApproximate(Cuda):
    """cuDNN's fused convolution with s8 output: fast, and not the same codes.

    Its epilogue is clip(sums * constant + bias + residual * constant), one scale per tensor and a
    rounding of its own: the channels' multipliers have to go into the weights, which are rounded
    to s8 once more, code by code w m_c / max(m). `jaxqat.integer.verify.compare` counts the codes
    that differ.
    """

    def __init__(self, graph: g.IntegerGraph):
        zeros = [t.name for t in graph.tensors.values() if t.zero_point != 0]
        if zeros or graph.requantization != "float":
            raise ValueError(
                "'cuda_approximate' is for graphs of the recipe 'int8_symmetric' with float "
                f"requantization; {zeros[0] if zeros else 'this one'} has "
                f"{'a zero point' if zeros else 'fixed point'}."
            )
        super().__init__(graph)

    def prepare(self, node: g.Product) -> dict[str, np.ndarray]:
        """Weights and bias on one scale for all channels."""
        own = super().prepare(node)
        if not _fuses(node, self.graph):
            return own
        largest = node.multiplier.max()
        ratio = node.multiplier.astype(np.float64) / largest
        shape = (-1,) + (1,) * (node.weights.ndim - 1)
        weights = np.rint(own["weights"] * ratio.reshape(shape)).astype(np.int8)
        bias = (node.bias * node.multiplier.astype(np.float64)).astype(np.float32)
        return {"weights": weights, "bias": bias}

    def product(self, node: g.Product, own: dict[str, Array], codes: Array) -> Array:
        """A convolution with cuDNN's epilogue."""
        if not _fuses(node, self.graph):
            return super().product(node, own, codes)
        tensor = self.graph.tensors[node.output]
        sums = convolve(node, codes, own["weights"], "o_i").astype(jnp.float32)
        values = sums * jnp.float32(node.multiplier.max()) + own["bias"]
        if tensor.low >= 0:
            values = jnp.maximum(values, 0)
        # cuDNN saturates to the whole of s8, and nothing else fuses.
        return jnp.clip(values, g.CODE_MIN, g.CODE_MAX).astype(jnp.int8)


def _fuses(node: g.Product, graph: g.IntegerGraph) -> bool:
    return node.kind == "conv" and node.groups == 1 and node.output in graph.tensors
