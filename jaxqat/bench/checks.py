"""Whether engines compute the same: no time of a wrong result is reported."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxqat.errors import InputError
from jaxqat.integer import graph as g

# An unrelated result of the same size has a relative error of 1.4, one of zeros has 1. What
# quantization costs stays below, as long as tensors have some codes: 8 are what 4 bits leave
# behind a symmetric ReLU. A network of fewer is another than its float one, which nothing bounds.
QUANTIZED_LIMIT, FEW_CODES = 0.7, 8
# Requantized codes are equal; the last product ends in float32, in whatever order of two or three
# multiplications.
EXACT_LIMIT = 2.0**-20
# Relative error that one layer adds: float32 sums of some thousand products (sqrt(4096) 2**-24),
# operands of 11 bits (TF32), operands and results of 8 bits (bfloat16).
FLOAT_LIMITS = {"fp32": 2.0**-18, "tf32": 2.0**-10, "bf16": 2.0**-7}


class BenchmarkError(InputError):
    """Nothing can be measured as asked, or engines disagree; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A result compared with another engine's.

    Attributes:
        engine: Key of the engine.
        against: Key of the engine it is compared with.
        error: Root mean square of the difference over that of the other result.
        limit: The largest error that is right; None if every finite one is.
        top1: Share of images of the same class.
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
    """An engine's result beside another's.

    Args:
        engine: Key of the engine.
        result: Its logits.
        against: Key of the other engine.
        reference: The other's logits.
        limit: See `Agreement`.
        where: What was run, for the error.

    Raises:
        BenchmarkError: The error is above the limit, or one of them is not finite.
    """
    error = relative_error(result, reference)
    wrong = not np.isfinite(error) if limit is None else not error <= limit  # NaN is above, too.
    if wrong:
        allowed = "any finite number" if limit is None else f"at most {limit:.3g}"
        raise BenchmarkError(
            f"{where}: {engine} and {against} disagree: the relative error of their results is "
            f"{error:.3g}; right would be {allowed}. Times of wrong results are not reported."
        )
    same = result.argmax(-1) == reference.argmax(-1)
    return Agreement(engine, against, error, limit, float(same.mean()))


def relative_error(result: Any, reference: Any) -> float:
    """sqrt(sum((a - b)**2) / sum(b**2)) in float64; infinite for results of other shapes."""
    result, reference = np.asarray(result, np.float64), np.asarray(reference, np.float64)
    if result.shape != reference.shape:
        return float("inf")
    size = float(np.sum(reference**2))
    error = float(np.sum((result - reference) ** 2))
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return float(np.sqrt(error / size))


def quantized_limit(graph: g.IntegerGraph) -> float | None:
    """The largest relative error of an integer network to its float one, if there is a limit."""
    coarse = any(t.high - t.low + 1 < FEW_CODES for t in graph.tensors.values())
    return None if coarse else QUANTIZED_LIMIT


def float_limit(graph: g.IntegerGraph, precision: str) -> float:
    """The largest relative error of a float network: that of a layer, for each of them."""
    layers = sum(isinstance(node, g.Product | g.Add) for node in graph.nodes)
    return FLOAT_LIMITS[precision] * layers
