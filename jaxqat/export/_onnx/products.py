"""Weights and geometry of a product in ONNX's terms."""

import numpy as np

from jaxqat.errors import ExportError
from jaxqat.integer.graph import Product


def oriented_weights(weights: np.ndarray, kind: str, spatial: int) -> np.ndarray:
    """Return weights in ONNX's layout: (in, out) for a Gemm, (out, in, *window) for a Conv.

    A dense layer with spatial axes is a convolution with a window of 1.
    """
    if spatial == 0:
        return weights
    if kind == "dense":
        weights = weights.reshape(*(1,) * spatial, *weights.shape)
    return weights.transpose(spatial + 1, spatial, *range(spatial))


def geometry(node: Product, spatial: int) -> dict[str, object]:
    """Return the attributes of a Conv with this number of spatial axes.

    Raises:
        ExportError: If the padding is negative.
    """
    padding = node.padding or ((0, 0),) * spatial
    if any(end < 0 for pair in padding for end in pair):
        raise ExportError(
            f"node {node.name!r}: ONNX convolutions need padding of 0 or more, got {padding}."
        )
    return {
        "kernel_shape": list(node.window or (1,) * spatial),
        "strides": list(node.strides or (1,) * spatial),
        "dilations": list(node.dilation or (1,) * spatial),
        "pads": [low for low, _ in padding] + [high for _, high in padding],
        "group": node.groups,
    }
