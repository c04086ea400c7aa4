"""Range estimators: the real values that codes of weights, or of one batch of activations, cover.

Codes have two errors, rounding and clipping, and a narrower range trades one for the other
(Krishnamoorthi 2018, arXiv:1806.08342, section 3.1). `ranges.observe` averages over batches.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aqt.jax.v2 import calibration as aqt_calibration
from jaxtyping import Array, Float

from jaxqat.quant._numerics import injection
from jaxqat.quant._numerics.grids import Grid, grid
from jaxqat.quant.recipe import Settings

# Fractions of the largest magnitude that a search tries, as clipping bounds.
FRACTIONS = tuple(float(x) for x in np.linspace(0.05, 1.0, 20, dtype=np.float32))

# Methods that depend on all values of a tensor, not only on its extremes.
OF_ALL_VALUES = ("percentile", "mse", "snr")

Extent = tuple[Float[Array, ""], Float[Array, ""]]


def activation_extent(
    x: Float[Array, "..."], settings: Settings, axes: tuple[str, ...] = ()
) -> Extent:
    """Return the range of one batch, in float32 and without a gradient.

    Args:
        x: The tensor.
        settings: `act_range` is the method: 'percentile', 'mse' or 'snr'; any other takes the
            minimum and the maximum.
        axes: Mapped axes over which the batch is split. These three methods gather the whole
            tensor on every device; minimum and maximum are reduced.

    Returns:
        Smallest and largest real value to cover, the same on all devices.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    if axes and settings.act_range in OF_ALL_VALUES:
        x = jax.lax.all_gather(x, axes)
    low, high = _extent(x, settings)
    # After gathering, all devices have the same values; reduced, JAX knows so too.
    return (jax.lax.pmin(low, axes), jax.lax.pmax(high, axes)) if axes else (low, high)


def mean_magnitude(x: Float[Array, "..."], axes: tuple[str, ...] = ()) -> Float[Array, ""]:
    """Return mean|x| of one batch, in float32 and without a gradient.

    Args:
        x: The tensor.
        axes: Mapped axes over which the batch is split, into parts of equal size.
    """
    mean = jnp.mean(jnp.abs(jax.lax.stop_gradient(x).astype(jnp.float32)))
    return jax.lax.pmean(mean, axes) if axes else mean


def _extent(x: Float[Array, "..."], settings: Settings) -> Extent:
    if settings.act_range == "percentile":
        share = settings.percentile
        low, high = jnp.percentile(x.reshape(-1), jnp.asarray([100 - share, share]))
        return low, high
    low, high = jnp.min(x), jnp.max(x)
    if settings.act_range == "mse":
        return _least_error(x, low, high, settings)
    if settings.act_range == "snr":
        assert settings.act_bits is not None
        bits = settings.act_bits
        scale = _by_aqt(x, bits, tuple(range(x.ndim)), _snr_search())[1].reshape(())
        bound = scale * (2 ** (bits - 1) - 1)
        return jnp.maximum(low, -bound), jnp.minimum(high, bound)
    return low, high


def _least_error(x: Float[Array, "..."], low: Array, high: Array, settings: Settings) -> Extent:
    """Return the range (f low, f high) of least squared error among the fractions f."""
    assert settings.act_bits is not None
    bits, symmetric = settings.act_bits, settings.activations == "symmetric"

    def error(fraction: Array) -> Array:
        g = grid(fraction * low, fraction * high, bits=bits, symmetric=symmetric)
        return jnp.mean(jnp.square(_rounded(x, g) - x))

    fractions = jnp.asarray(FRACTIONS[::-1])  # The widest range wins a tie.
    best = fractions[jnp.argmin(jax.lax.map(error, fractions))]
    return best * low, best * high


def _rounded(x: Float[Array, "..."], g: Grid) -> Float[Array, "..."]:
    codes = jnp.clip(jnp.round(x * g.inverse) + g.zero, g.low, g.high)
    return (codes - g.zero) * g.scale


def weight_scale(
    weights: Float[Array, "..."], settings: Settings, axes: tuple[int, ...]
) -> Float[Array, "..."]:
    """Return scales of weights that clip the largest ones, by `weight_range`.

    'percentile': scale = percentile(|w|) / (2**(bits-1) - 1). 'mse': the bound f max|w|, f in
    `FRACTIONS`, of least squared error. 'snr': the same search, by AQT.

    Args:
        weights: Float32.
        settings: Bits and estimator.
        axes: Axes that share one scale.

    Returns:
        float32, of the weights' rank with `axes` reduced to 1; positive.
    """
    assert settings.weight_bits is not None
    bits, top = settings.weight_bits, 2 ** (settings.weight_bits - 1) - 1
    if settings.weight_range == "snr":
        return _by_aqt(weights, bits, axes, _snr_search())[1]
    magnitudes = jnp.abs(weights)
    if settings.weight_range == "percentile":
        bound = jnp.percentile(magnitudes, settings.percentile, axis=axes, keepdims=True)
        return _positive(bound / top)
    largest = jnp.max(magnitudes, axis=axes, keepdims=True)

    def error(fraction: Array) -> Array:
        scale = _positive(fraction * largest / top)
        rounded = jnp.clip(jnp.round(weights / scale), -top, top) * scale
        return jnp.mean(jnp.square(rounded - weights), axis=axes, keepdims=True)

    fractions = jnp.asarray(FRACTIONS[::-1])
    best = fractions[jnp.argmin(jax.lax.map(error, fractions), axis=0)]
    return _positive(best * largest / top)


def first_step_size(magnitude: Float[Array, "..."], positive_codes: Any) -> Float[Array, "..."]:
    """Return the first value of a learned step size, 2 mean|v| / sqrt(Q_P) (LSQ, section 2.1).

    Args:
        magnitude: mean|v| of the values that share the step size.
        positive_codes: Q_P, the number of codes above zero.
    """
    step_size = 2 * magnitude / jnp.sqrt(jnp.asarray(positive_codes, jnp.float32))
    return jnp.where(step_size > 0, step_size, 1.0)


def absmax(
    weights: Float[Array, "..."], bits: int, axes: tuple[int, ...]
) -> tuple[Array, Float[Array, "..."]]:
    """Return codes and scales of weights by AQT: scale = max|w| / (2**(bits-1) - 1)."""
    return _by_aqt(weights, bits, axes, injection.AbsMax)


def _by_aqt(
    x: Float[Array, "..."], bits: int, axes: tuple[int, ...], calibration: Any
) -> tuple[Array, Float[Array, "..."]]:
    quantizer = injection.make_quantizer(injection.symmetric(bits), calibration, axes)
    quantizer.init_calibration()
    tensor: Any = quantizer.quant(x, calibration_axes=None)[0]
    return tensor.qvalue, tensor.scale[0]


def _snr_search() -> Any:
    calibration: Any = aqt_calibration.SnrBasedAutoCalibration
    return functools.partial(calibration, auto_clip_search_config=FRACTIONS)


def _positive(scale: Array) -> Array:
    return jnp.where(scale <= np.finfo(np.float32).tiny, jnp.float32(1), scale)
