"""Activation ranges over time.

A range is a small explicit state, `{"min", "max", "count"}`: exponential moving averages of the
minimum and maximum of a tensor (Jacob et al. 2018, arXiv:1712.05877, section 3.1), which start as
plain means. `grids` turns a range into a scale and a zero point.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

Range = dict[str, Array]


def empty_range() -> Range:
    """Return the range before the first batch: float32 zeros and a count of 0."""
    zero = jnp.zeros((), jnp.float32)
    return {"min": zero, "max": zero, "count": jnp.zeros((), jnp.int32)}


def observe(
    state: Range, low: Float[Array, ""], high: Float[Array, ""], decay: float | None
) -> Range:
    """Return the range after one more batch.

    m <- m + k (m_batch - m) with k = max(1 / (count + 1), 1 - decay): the mean of the first
    1 / (1 - decay) batches, then a moving average. An average that started at zero would clip for
    hundreds of batches.

    Args:
        state: The range so far.
        low: Minimum of the batch.
        high: Maximum of the batch.
        decay: Weight of the old value, 0 up to 1; None takes the extremes of all batches.
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
    """Return the mean of a leaf of the state over all batches, with one more."""
    return state[leaf] + (new - state[leaf]) / (state["count"] + 1)
