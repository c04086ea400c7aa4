"""Execution on NVIDIA GPUs, from sm_75 on, with cuDNN's s8 convolutions.

cuDNN has no s8 convolution with an s32 result, only with float32, which holds sums exactly below
2**24. A layer whose sums could be larger is cut into groups of input channels whose sums cannot;
these sums are added as int32. If the window alone is too large, the layer becomes a dot over
gathered windows. `PallasCuda` (sm_80 on) has kernels that stay in int32 and write s8.
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
    """cuDNN convolutions with float32 results that are exact."""

    def __init__(self, graph: g.IntegerGraph):
        convolutions = [p for p in graph.products() if p.kind == "conv" and not is_depthwise(p)]
        found = {node.name: parts(node) for node in convolutions}
        self._parts = {name: cuts for name, cuts in found.items() if cuts is not None}
        super().__init__(graph)

    def prepare(self, node: g.Product) -> dict[str, np.ndarray]:
        """Weights with the outputs first, which cuDNN takes without a transposition; a part for
        each convolution that the layer becomes.
        """
        own = super().prepare(node)
        if node.name in self._parts:
            weights = own.pop("weights")
            axes = (weights.ndim - 1, *range(weights.ndim - 1))
            for number, (outputs, _, inside) in enumerate(self._parts[node.name]):
                own[f"weights{number}"] = weights.transpose(axes)[outputs, ..., inside].copy()
        return own

    def accumulate(self, node: g.Product, own: dict[str, Array], codes: Array) -> Int[Array, "..."]:
        """The int32 accumulator of a product, its bias added."""
        if node.kind == "dense" or is_depthwise(node):
            return super().accumulate(node, own, codes)
        if node.name not in self._parts:
            return self._over_windows(node, own["weights"], codes) + own["bias"]
        whole = dataclasses.replace(node, groups=1) if node.groups > 1 else node
        sums: dict[int, Any] = {}
        cuts = self._parts[node.name]
        for number, (outputs, inputs, _) in enumerate(cuts):
            part = codes
            if len(cuts) > 1:
                # Behind the barrier XLA sees the s8 tensor that cuDNN has to be given.
                part = lax.optimization_barrier(codes[..., inputs])
            # cuDNN has no s32 output, so the sums are converted at once. The bounds, which hold
            # anyway, keep XLA from taking that and the conversion back away.
            found = convolve(whole, part, own[f"weights{number}"], "o_i").astype(jnp.float32)
            found = jnp.clip(found, -EXACT_FLOAT, EXACT_FLOAT).astype(jnp.int32)
            sums[outputs.start] = sums.get(outputs.start, 0) + found
        return jnp.concatenate(list(sums.values()), -1) + own["bias"]

    def _over_windows(self, node: g.Product, weights: Array, codes: Array) -> Int[Array, "..."]:
        """The convolution as s8 dots with s32 results, one for each group of channels."""
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


def parts(node: g.Product) -> list[tuple[slice, slice, slice]] | None:
    """The convolutions that a layer becomes: its outputs, inputs, and those within their group.

    Each group of channels is one (grouped s8 convolutions have given wrong sums in cuDNN), and
    where sums could reach 2**24, which float32 does not hold exactly, the inputs are cut. None if
    no cut is fine enough.
    """
    inputs, outputs = node.weights.shape[-2], node.channels // node.groups
    cuts = []
    for group in range(node.groups):
        made = slice(group * outputs, (group + 1) * outputs)
        found = exact_cuts(node.weights[..., made])
        if found is None:
            return None
        for start, stop in found:
            read = slice(group * inputs + start, group * inputs + stop)
            cuts.append((made, read, slice(start, stop)))
    return cuts


def exact_cuts(weights: np.ndarray) -> list[tuple[int, int]] | None:
    """Ranges of input channels whose sums stay below 2**24 whatever the codes are, if any do."""
    magnitudes = np.abs(weights.astype(np.int64)) * -g.CODE_MIN
    by_input = magnitudes.reshape(-1, *weights.shape[-2:]).sum(0)  # (inputs, outputs)
    cuts, start = [], 0
    for channel in range(4, len(by_input), 4):  # cuDNN wants multiples of 4 channels.
        if by_input[start : channel + 4].sum(0).max() >= EXACT_FLOAT:
            cuts.append((start, channel))
            start = channel
    cuts.append((start, len(by_input)))
    exact = all(by_input[a:b].sum(0).max() < EXACT_FLOAT for a, b in cuts)
    return cuts if exact else None
