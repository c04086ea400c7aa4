"""Execution on NVIDIA GPUs, from sm_75 on, with cuDNN's s8 convolutions.

cuDNN's s8 convolutions return float32, not s32, which is exact for sums up to 2**24. A layer whose
sums could reach that is split by input channels into convolutions whose sums cannot; these are
added as int32. If no split is fine enough, the layer becomes a dot over gathered windows.
`PallasCuda` (sm_80 on) has kernels that accumulate in int32 and write s8.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxqat.integer import graph as g
from jaxqat.integer._execute.base import Platform, convolve, is_depthwise, windows

EXACT_FLOAT = 2**24


class Cuda(Platform):
    """Compute convolutions with cuDNN, whose float32 results are exact."""

    def __init__(self, graph: g.IntegerGraph):
        convolutions = [p for p in graph.products() if p.kind == "conv" and not is_depthwise(p)]
        parts = {node.name: exact_parts(node) for node in convolutions}
        self._parts = {name: each for name, each in parts.items() if each is not None}
        super().__init__(graph)

    def prepare(self, node: g.Product) -> dict[str, np.ndarray]:
        """Return one array of weights for each part of a split layer.

        The outputs are the first axis, which cuDNN reads without a transposition.
        """
        arrays = super().prepare(node)
        if node.name in self._parts:
            weights = arrays.pop("weights")
            axes = (weights.ndim - 1, *range(weights.ndim - 1))
            for number, (outputs, _, in_group) in enumerate(self._parts[node.name]):
                arrays[f"weights{number}"] = weights.transpose(axes)[outputs, ..., in_group].copy()
        return arrays

    def accumulate(
        self, node: g.Product, arrays: dict[str, Array], codes: Array
    ) -> Int[Array, "..."]:
        """Return the int32 accumulator of a product, with its bias."""
        if node.kind == "dense" or is_depthwise(node):
            return super().accumulate(node, arrays, codes)
        if node.name not in self._parts:
            return self._dot_over_windows(node, arrays["weights"], codes) + arrays["bias"]
        ungrouped = dataclasses.replace(node, groups=1) if node.groups > 1 else node
        sums: dict[int, Any] = {}
        parts = self._parts[node.name]
        for number, (outputs, inputs, _) in enumerate(parts):
            part = codes
            if len(parts) > 1:
                # After the barrier XLA sees a plain s8 tensor, which cuDNN needs.
                part = lax.optimization_barrier(codes[..., inputs])
            # cuDNN has no s32 output, so convert to float32 at once. The clip changes no value, but
            # keeps XLA from simplifying the two conversions away.
            acc = convolve(ungrouped, part, arrays[f"weights{number}"], "o_i").astype(jnp.float32)
            acc = jnp.clip(acc, -EXACT_FLOAT, EXACT_FLOAT).astype(jnp.int32)
            sums[outputs.start] = sums.get(outputs.start, 0) + acc
        return jnp.concatenate(list(sums.values()), -1) + arrays["bias"]

    def _dot_over_windows(self, node: g.Product, weights: Array, codes: Array) -> Int[Array, "..."]:
        """Return the convolution as s8 dots with s32 results, one per channel group."""
        padding = [(0, 0, 0), *((low, high, 0) for low, high in node.padding), (0, 0, 0)]
        padded = lax.pad(codes, np.zeros((), codes.dtype), padding)
        columns = jnp.stack([window for _, window in windows(node, padded)], -2)
        inputs = jnp.split(columns, node.groups, -1)
        outputs = jnp.split(weights, node.groups, -1)
        sums = [
            self.dot(x.reshape(*x.shape[:-2], -1), w.reshape(-1, w.shape[-1]))
            for x, w in zip(inputs, outputs, strict=True)
        ]
        return jnp.concatenate(sums, -1)


def exact_parts(node: g.Product) -> list[tuple[slice, slice, slice]] | None:
    """Return the parts into which a layer is split, so that float32 holds every sum exactly.

    Each channel group is a part (grouped s8 convolutions have given wrong sums in cuDNN). If sums
    could reach 2**24, a group is split further by its inputs.

    Returns:
        Output channels, input channels, and input channels within the group, of each part; None if
        no split is fine enough.
    """
    inputs, outputs = node.weights.shape[-2], node.channels // node.groups
    parts = []
    for group in range(node.groups):
        group_outputs = slice(group * outputs, (group + 1) * outputs)
        ranges = exact_ranges(node.weights[..., group_outputs])
        if ranges is None:
            return None
        for start, stop in ranges:
            part_inputs = slice(group * inputs + start, group * inputs + stop)
            parts.append((group_outputs, part_inputs, slice(start, stop)))
    return parts


def exact_ranges(weights: np.ndarray) -> list[tuple[int, int]] | None:
    """Return ranges of input channels whose sums stay below 2**24 for all codes, or None."""
    magnitudes = np.abs(weights.astype(np.int64)) * -g.CODE_MIN
    by_input = magnitudes.reshape(-1, *weights.shape[-2:]).sum(0)  # (inputs, outputs)
    ranges, start = [], 0
    for channel in range(4, len(by_input), 4):  # cuDNN needs multiples of 4 channels.
        if by_input[start : channel + 4].sum(0).max() >= EXACT_FLOAT:
            ranges.append((start, channel))
            start = channel
    ranges.append((start, len(by_input)))
    exact = all(by_input[a:b].sum(0).max() < EXACT_FLOAT for a, b in ranges)
    return ranges if exact else None
