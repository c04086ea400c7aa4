"""Measurements that are summed over batches, on the device and on the host.

The device sums over each example in float32; the host sums over examples in float64.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxqat.analysis.result import Effect
from jaxqat.errors import QuantizationError
from jaxqat.integer._compare import in_decibels
from jaxqat.quant._interpret import EvaluatedLayer, Evaluator
from jaxqat.quant._numerics.activations import dequantize, in_units
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._numerics.promotion import default_promotion
from jaxqat.quant._plan.plan import Pair

BINS_INSIDE = 64  # Bins of a histogram for values that are not clipped.
BINS_OUTSIDE = 16  # Bins below them, and as many above.


class Noise(NamedTuple):
    """Sums of squares, one per example: of a tensor, and of its quantization error.

    A sum of n squares in float32 is off by at most n * 2**-24 of itself.
    """

    signal: Float[Array, "n"]
    noise: Float[Array, "n"]

    @classmethod
    def of(cls, real: Float[Array, "n ..."], value: Float[Array, "n ..."]) -> "Noise":
        """Return the noise of quantized values against the real ones."""
        real, value = (x.astype(jnp.float32) for x in (real, value))
        axes = tuple(range(1, real.ndim))
        return cls(jnp.sum(real**2, axes), jnp.sum((real - value) ** 2, axes))


class Spread(NamedTuple):
    """Clipped values and histogram of a tensor; the first axis, of size 1, is summed over."""

    clipped: Int[Array, "1"]
    counts: Int[Array, "1 bins"]


class Totals(NamedTuple):
    """Measurements that add up over batches.

    Attributes:
        weights: Noise of each layer's weights, in order; None without weights.
        outputs: Noise of each layer's result, in order.
        tensors: Noise of each tensor, by name.
        spreads: Clipped values and histogram of each tensor, by name.
    """

    weights: list[Noise | None]
    outputs: list[Noise]
    tensors: dict[str, Noise]
    spreads: dict[str, Spread]


class Measurements(NamedTuple):
    """Measurements of one batch or several.

    Attributes:
        sums: Measurements that add up.
        extremes: Smallest value and the largest negated, by tensor; both combine by minimum.
        ends: Real values of the first and the last code, by tensor; the same for all batches.
        edges: Edges of the histograms, by tensor; the same for all batches.
    """

    sums: Totals
    extremes: dict[str, Float[Array, "2"]]
    ends: dict[str, Float[Array, "2"]]
    edges: dict[str, Float[Array, "bins+1"]]

    def plus(self, other: "Measurements") -> "Measurements":
        """Return the measurements of both together; both are on the host."""
        sums = jax.tree.map(np.add, self.sums, other.sums)
        extremes = jax.tree.map(np.minimum, self.extremes, other.extremes)
        return self._replace(sums=sums, extremes=extremes)

    def on_host(self) -> "Measurements":
        """Return the measurements on the host, summed over the examples."""
        sums = jax.tree.map(lambda x: _wide(x).sum(0), self.sums)
        rest = (jax.tree.map(_wide, x) for x in (self.extremes, self.ends, self.edges))
        return Measurements(sums, *rest)


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


@default_promotion
def measure(real: Evaluator, quantized: Evaluator) -> Measurements:
    """Compare an evaluation in float with a quantized one, of the same batch."""
    outputs = [
        Noise.of(each.result, quantized.layers[key].result) for key, each in real.layers.items()
    ]
    tensors, spreads, extremes, ends, edges = {}, {}, {}, {}, {}
    for key, codes in quantized.codes.items():
        name, values = "/".join(key), real.observed[key]
        tensors[name] = Noise.of(values, dequantize(codes.codes, codes.grid, jnp.float32))
        ends[name] = codes.grid.scale * (_code_ends(codes.grid) - codes.grid.zero)
        edges[name] = _edges(codes.grid)
        spreads[name] = _spread(values, codes.grid, edges[name])
        extremes[name] = jnp.stack([values.min(), -values.max()])
    weights = [_weight_noise(each) for each in real.layers.values()]
    return Measurements(Totals(weights, outputs, tensors, spreads), extremes, ends, edges)


def _weight_noise(each: EvaluatedLayer) -> Noise | None:
    if isinstance(each.layer, Pair):
        return None
    quantizer = each.layer.quantizer
    codes, scale = quantizer.quantize(each.weights, each.step_size)
    return Noise.of(each.weights, quantizer.dequantize(codes, scale))


def _code_ends(grid: Grid) -> np.ndarray:
    return np.array([grid.low, grid.high], np.float32)


def _edges(grid: Grid) -> Float[Array, "bins+1"]:
    """Return edges of which two lie where clipping begins, half a unit beyond the grid's ends."""
    low, high = _code_ends(grid) + np.array([-0.5, 0.5], np.float32)
    bins = np.arange(-BINS_OUTSIDE, BINS_INSIDE + BINS_OUTSIDE + 1, dtype=np.float32)
    return grid.scale * (low + (high - low) / BINS_INSIDE * bins - grid.zero)


def _spread(values: Float[Array, "..."], grid: Grid, edges: Float[Array, "bins+1"]) -> Spread:
    codes = jnp.round(in_units(values, grid)) + grid.zero
    clipped = jnp.sum((codes < grid.low) | (codes > grid.high))
    bins = len(edges) - 1
    # Only inner edges: values beyond the outer ones fall into the first and the last bin.
    chosen = jnp.searchsorted(edges[1:-1], values.reshape(-1).astype(jnp.float32), side="right")
    return Spread(clipped[None], jnp.bincount(chosen, length=bins)[None])


@dataclasses.dataclass
class Score:
    """Result of one choice of quantized layers, summed over batches."""

    examples: int = 0
    classified: int = 0
    signal: float = 0.0
    noise: float = 0.0
    agreeing: int = 0
    correct: int = 0
    labelled: bool = False

    def add(self, result: np.ndarray, real: np.ndarray, labels: np.ndarray | None) -> None:
        """Add a batch: its result, the float network's result, and the labels if given."""
        wide, exact = result.astype(np.float64), real.astype(np.float64)
        self.examples += len(exact)
        self.signal += float((exact**2).sum())
        self.noise += float(((exact - wide) ** 2).sum())
        if not np.isfinite([self.signal, self.noise]).all():
            raise QuantizationError(
                "The network's result is not finite on these batches (NaN or infinite), so its "
                "noise cannot be measured."
            )
        if real.ndim > 1 and real.shape[-1] > 1:
            classes = result.argmax(-1)
            self.classified += classes.size
            self.agreeing += int((classes == real.argmax(-1)).sum())
            if labels is not None:
                self.labelled = True
                self.correct += int((classes == labels).sum())

    def effect(self) -> Effect:
        """Return the effect on the result."""
        agreement = self.agreeing / self.classified if self.classified else None
        accuracy = self.correct / self.classified if self.labelled else None
        return Effect(in_decibels(self.signal, self.noise), agreement, accuracy)
