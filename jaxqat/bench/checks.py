"""Check that engines compute the same results: times of wrong results are not reported."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxqat.errors import InputError
from jaxqat.integer import graph as g

# An unrelated result of equal size has a relative error of 1.4, zeros have 1. Quantization stays
# below if each tensor has at least 8 codes, those of 4 bits after a symmetric ReLU. With fewer, the
# error has no useful limit.
QUANTIZED_LIMIT, FEW_CODES = 0.7, 8
# Requantized codes are equal; the last product ends with two or three float32 multiplications, in
# any order.
EXACT_LIMIT = 2.0**-20
# Relative error per layer: float32 sums of some thousand products (sqrt(4096) 2**-24), operands of
# 11 bits (TF32), operands and results of 8 bits (bfloat16).
FLOAT_LIMITS = {"fp32": 2.0**-18, "tf32": 2.0**-10, "bf16": 2.0**-7}


class BenchmarkError(InputError):
    """A benchmark cannot run, or engines disagree; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The result of an engine compared with another engine's.

    Attributes:
        engine: Key of the engine.
        against: Key of the reference engine.
        error: Root mean square of the difference, divided by that of the reference.
        limit: Largest accepted error; None if every finite one is accepted.
        top1: Share of images with the same class.
    """

    engine: str
    against: str
    error: float
    limit: float | None
    top1: float


def compare(
    engine: str,
    result: Float[np.ndarray, "n k"],
    against: str,
    reference: Float[np.ndarray, "n k"],
    limit: float | None,
    where: str,
) -> Agreement:
    """Compare the result of an engine with that of a reference engine.

    Args:
        engine: Key of the engine.
        result: Its logits.
        against: Key of the reference engine.
        reference: Logits of the reference engine.
        limit: See `Agreement`.
        where: Name of the measurement, for the error message.

    Raises:
        BenchmarkError: If the error is above the limit, or a result is not finite.
    """
    error = relative_error(result, reference)
    wrong = not np.isfinite(error) if limit is None else not error <= limit  # Also if it is NaN.
    if wrong:
        expected = "a finite number" if limit is None else f"at most {limit:.3g}"
        raise BenchmarkError(
            f"{where}: {engine} and {against} disagree: the relative error of their results is "
            f"{error:.3g}, expected {expected}. Times of wrong results are not reported."
        )
    same = result.argmax(-1) == reference.argmax(-1)
    return Agreement(engine, against, error, limit, float(same.mean()))


def relative_error(result: Any, reference: Any) -> float:
    """Return sqrt(sum((a - b)**2) / sum(b**2)) in float64; infinity if the shapes differ."""
    result, reference = np.asarray(result, np.float64), np.asarray(reference, np.float64)
    if result.shape != reference.shape:
        return float("inf")
    size = float(np.sum(reference**2))
    error = float(np.sum((result - reference) ** 2))
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return float(np.sqrt(error / size))


def quantized_limit(graph: g.IntegerGraph) -> float | None:
    """Return the limit of an integer network's error relative to float; None without a limit."""
    coarse = any(t.high - t.low + 1 < FEW_CODES for t in graph.tensors.values())
    return None if coarse else QUANTIZED_LIMIT


def float_limit(graph: g.IntegerGraph, precision: str) -> float:
    """Return the limit of a float network's relative error: that per layer, times all layers."""
    layers = sum(isinstance(node, g.Product | g.Add) for node in graph.nodes)
    return FLOAT_LIMITS[precision] * layers
