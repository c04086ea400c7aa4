"""Execution on NVIDIA GPUs, from sm_75 on, with cuDNN's s8 convolutions.

A convolution is split so that cuDNN's float32 sums are exact, by the rule of
`quant/_numerics/cudnn.py`, which training follows too. Here the weights are known, and decide.
`PallasCuda` (sm_80 on) has kernels that accumulate in int32 and write s8.
"""

import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxqat.integer import graph as g
from jaxqat.integer._execute.base import Platform
from jaxqat.integer._execute.geometry import convolve, is_depthwise
from jaxqat.quant._numerics import cudnn
from jaxqat.quant._numerics.windows import dot_over_windows


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
            weights = weights.transpose(axes)
            for name, part in self._named_parts(node):
                arrays[name] = weights[part.outputs, ..., part.in_group].copy()
        return arrays

    def accumulate(
        self, node: g.Product, arrays: dict[str, Array], codes: Array
    ) -> Int[Array, "..."]:
        """Return the int32 accumulator of a product, with its bias."""
        if node.kind == "dense" or is_depthwise(node):
            return super().accumulate(node, arrays, codes)
        if node.name not in self._parts:
            return self._dot_over_windows(node, arrays["weights"], codes) + arrays["bias"]
        sums = cudnn.convolve(
            [(part, arrays[name]) for name, part in self._named_parts(node)],
            codes,
            lambda x, w: convolve(node, x, w, "o_i", groups=1),
            axes=(-1, -1),
        )
        return sums + arrays["bias"]

    def _named_parts(self, node: g.Product) -> list[tuple[str, cudnn.Part]]:
        return [(f"weights{i}", part) for i, part in enumerate(self._parts[node.name])]

    def _dot_over_windows(self, node: g.Product, weights: Array, codes: Array) -> Int[Array, "..."]:
        padding = [(0, 0, 0), *((low, high, 0) for low, high in node.padding), (0, 0, 0)]
        padded = lax.pad(codes, np.zeros((), codes.dtype), padding)
        return dot_over_windows(padded, weights, node.strides, node.dilation, node.groups)


def exact_parts(node: g.Product) -> list[cudnn.Part] | None:
    """Return the parts into which a convolution with these weights is split, or None."""
    magnitudes = np.abs(node.weights.astype(np.int64)) * -g.CODE_MIN
    return cudnn.exact_parts(magnitudes.reshape(-1, *magnitudes.shape[-2:]).sum(0), node.groups)
