"""Activation ranges over time, and the integer grid that a range stands for.

A range is a small explicit state, `{"min", "max", "count"}`: an exponential moving average of the
minimum and maximum of a tensor (Jacob et al. 2018, arXiv:1712.05877, section 3.1), which begins
as the plain mean of what was seen. A grid turns a range into a scale and an integer zero point,

    real = scale * (code - zero_point),

with zero always a code (ibid., equation 1). `GridCalibration` hands a grid's scale to AQT.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

Range = dict[str, Array]


def empty_range() -> Range:
    """A range that has seen nothing yet: float32 zeros and a count of 0."""
    zero = jnp.zeros((), jnp.float32)
    return {"min": zero, "max": zero, "count": jnp.zeros((), jnp.int32)}


def observe(
    state: Range, low: Float[Array, ""], high: Float[Array, ""], decay: float | None
) -> Range:
    """The range after one more batch.

    m <- m + k (m_batch - m) with k = max(1 / (count + 1), 1 - decay): the mean of what was seen
    during the first 1 / (1 - decay) batches, a moving average from then on. Without the first
    part an average that starts at zero would clip for hundreds of batches.

    Args:
        state: The range so far.
        low: Minimum of the batch.
        high: Maximum of the batch.
        decay: Share of the old value kept by a batch, 0 up to 1; None keeps the extremes instead.
    """
    if decay is None:
        seen = state["count"] > 0
        return {
            **state,
            "min": jnp.where(seen, jnp.minimum(state["min"], low), low),
            "max": jnp.where(seen, jnp.maximum(state["max"], high), high),
            "count": state["count"] + 1,
        }
    share = jnp.maximum(1.0 / (state["count"] + 1), 1.0 - decay).astype(jnp.float32)
    return {
        **state,
        "min": state["min"] + share * (low - state["min"]),
        "max": state["max"] + share * (high - state["max"]),
        "count": state["count"] + 1,
    }


def averaged(state: Range, leaf: str, new: Float[Array, ""]) -> Float[Array, ""]:
    """The mean of a leaf of the state over the batches seen, with one more."""
    return state[leaf] + (new - state[leaf]) / (state["count"] + 1)
