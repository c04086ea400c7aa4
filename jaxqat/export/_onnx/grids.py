"""Scales and zero points of an ONNX file, chosen so that integer kernels give the graph's codes.

ONNX's uint8 tensors hold u = code + offset. Kernels compute multipliers from the scales in the
file, in float32:

    QLinearConv, QGemm           (s_in * s_weight) / s_out
    QLinearGlobalAveragePool     s_in / (s_out * area)
    QLinearAdd                   s_a / s_out and s_b / s_out, one rounding with the zero point in it

The scales in the file are those from which these are the graph's multipliers to the bit. They
differ from the tensors' own by a few units in the last place; for the terms of a sum, also by the
rounding of its multipliers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxqat.integer.graph import Add, Concat, IntegerGraph, MaxPool, Move, Product, Tensor

UINT8_MAX = 255


def offsets(graph: IntegerGraph) -> dict[str, int]:
    """Return the number that is added to the codes of each tensor to make them uint8.

    The smallest code, or the zero point if that is smaller, becomes 0: a lower bound then costs
    nothing, since uint8 saturates there. Tensors among which codes are only moved share one. Sums
    get an even one: their zero point is inside the rounding, where an odd one would change ties.
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
    for node in graph.nodes:
        if isinstance(node, Add):
            lowest[root(node.output)] -= lowest[root(node.output)] % 2
    return {name: -lowest[root(name)] for name in graph.tensors}


def _near(value: float, count: int = 64) -> Iterator[np.float32]:
    """Yield the float32 numbers around a value, so many on each side, nearest first."""
    above = below = np.float32(value)
    yield above
    for _ in range(count):
        above = np.nextafter(above, np.float32(np.inf))
        below = np.nextafter(below, np.float32(0))
        yield from (above, below)


def weight_scales(node: Product, scale: np.float32, out: Tensor | None) -> np.ndarray | None:
    """Return weight scales that give a product's multipliers to the bit; None if none do."""
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
    """Return the input scale that gives a global average's multiplier; None if none does."""
    divisor = np.float32(out.scale) * np.float32(area)
    near = _near(float(multiplier) * float(divisor))
    return next((s for s in near if s / divisor == multiplier), None)


class SumScales(NamedTuple):
    """Scales of a QLinearAdd: of its terms, and of its output."""

    terms: tuple[np.float32, ...]
    out: np.float32


def sum_scales(node: Add, scale: np.float32) -> SumScales:
    """Return scales of a sum from which its multipliers follow to the bit.

    The kernel divides the scale of each term by that of the output. Not every quotient is a
    multiplier; the output's scale in the file then moves by a few units in the last place. The
    tensor's readers have a scale of their own, so no code changes.

    Args:
        node: The sum.
        scale: Scale of its output.
    """
    for out in _near(float(scale)):
        terms = [_dividend(m, out) for m in node.multipliers]
        if None not in terms:
            return SumScales(tuple(s for s in terms if s is not None), out)
    # Quotients by 1 are exact. Few sums come here (11 of 20,000 random ones), such as those with a
    # factor just below a power of two.
    return SumScales(node.multipliers, np.float32(1))


def _dividend(quotient: np.float32, divisor: np.float32) -> np.float32 | None:
    """Return the float32 that gives a quotient to the bit; None if there is none."""
    near = _near(float(quotient) * float(divisor), 2)
    return next((s for s in near if s / divisor == quotient), None)
