"""Scales and zero points of an ONNX file, chosen so that integer kernels give the graph's codes.

ONNX's uint8 tensors hold u = code + offset. Kernels compute multipliers from the scales in the
file, in float32:

    QLinearConv, QGemm           (s_in * s_weight) / s_out
    QLinearGlobalAveragePool     s_in / (s_out * area)
    QLinearAdd                   s_a / s_out and s_b / s_out, with one rounding for the sum

so a scale in the file is the one for which this is the graph's multiplier to the bit, which is at
most a few units in the last place from the tensor's own.
"""

from collections.abc import Iterator

import numpy as np

from jaxqat.integer.graph import Add, Concat, IntegerGraph, MaxPool, Move, Product, Tensor

UINT8_MAX = 255


def offsets(graph: IntegerGraph) -> dict[str, int]:
    """What is added to the codes of each tensor so that they are uint8.

    The smallest code, or the zero point if that is smaller, becomes 0: a lower bound then costs
    nothing, since uint8 saturates there. Tensors among which codes are only moved share theirs.
    """
    group = {name: name for name in graph.tensors}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for node in graph.nodes:
        if isinstance(node, Move | MaxPool | Concat):
            for name in node.inputs:
                group[root(name)] = root(node.output)
    lowest: dict[str, int] = {}
    for name, tensor in graph.tensors.items():
        bottom = min(tensor.low, tensor.zero_point)
        lowest[root(name)] = min(lowest.get(root(name), bottom), bottom)
    return {name: -lowest[root(name)] for name in graph.tensors}


def _near(value: float, steps: int = 64) -> Iterator[np.float32]:
    """The float32 numbers around a value, nearest first."""
    above = below = np.float32(value)
    yield above
    for _ in range(steps):
        above = np.nextafter(above, np.float32(np.inf))
        below = np.nextafter(below, np.float32(0))
        yield from (above, below)


def weight_scales(node: Product, scale: np.float32, out: Tensor | None) -> np.ndarray | None:
    """Weight scales of a product from which its multipliers follow to the bit; None if none do."""
    wanted = node.multiplier

    def multipliers(weight_scale):
        product = np.float32(scale) * weight_scale
        return product if out is None else product / np.float32(out.scale)

    if (multipliers(node.weight_scale) == wanted).all():
        return node.weight_scale
    ideal = wanted.astype(np.float64) / scale * (1.0 if out is None else out.scale)
    scales = [
        next((s for s in _near(i) if multipliers(s) == m), None)
        for i, m in zip(ideal, wanted, strict=True)
    ]
    return None if None in scales else np.array(scales, np.float32)


def pool_scale(multiplier: np.float32, area: int, out: Tensor) -> np.float32 | None:
    """Input scale of a global average from which its multiplier follows to the bit."""
    divisor = np.float32(out.scale) * np.float32(area)
    near = _near(float(multiplier) * float(divisor))
    return next((s for s in near if s / divisor == multiplier), None)


def sum_scales(node: Add, graph: IntegerGraph) -> tuple[np.float32, ...] | None:
    """Input scales with which one rounding of a sum of two gives what a rounding of each gives.

    One term has to be whole steps by itself. Of the other, each of the codes has its steps k, and
    those are round((q - z) * m) for all m of an interval around the graph's multiplier; its scale
    is taken from the middle, where no sum comes near a tie: nearer than all roundings of the
    kernel's float32 arithmetic together, and whatever their order.

    Returns:
        The scales, or None where the sum of the roundings has no such form.
    """
    if len(node.inputs) != 2:
        return None
    out = graph.tensors[node.output]
    tensors = [graph.tensors[name] for name in node.inputs]
    whole = [float(m).is_integer() for m in node.multipliers]
    if not any(whole):
        return None
    # A bound for every intermediate, and ten float32 roundings (scales, ratios, products, sums).
    largest = UINT8_MAX * (1 + sum(float(m) for m in node.multipliers))
    margin = 10 * largest * 2.0**-24
    scales = []
    for tensor, multiplier, exact in zip(tensors, node.multipliers, whole, strict=True):
        factor = float(multiplier) if exact else _clear_of_ties(tensor, multiplier, margin)
        if factor is None:
            return None
        scales.append(np.float32(factor * float(out.scale)))
    return tuple(scales)


def _clear_of_ties(tensor: Tensor, multiplier: np.float32, margin: float) -> float | None:
    """A factor with the same rounded steps for every code, none within `margin` of a tie."""
    steps = np.arange(tensor.low, tensor.high + 1) - tensor.zero_point
    steps = steps[steps != 0]
    if not steps.size:
        return float(multiplier)
    rounded = np.round(steps.astype(np.float32) * np.float32(multiplier)).astype(np.float64)
    ends = (rounded[:, None] + np.array([margin - 0.5, 0.5 - margin])) / steps[:, None]
    low, high = max(float(ends.min(1).max()), 0.0), float(ends.max(1).min())
    if low >= high:
        return None
    return (low + high) / 2
