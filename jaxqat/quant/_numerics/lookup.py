"""Looking codes up in tables."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def look_up(
    table: Shaped[Array, "entries"] | Shaped[Array, "entries channels"], index: Int[Array, "..."]
) -> Shaped[Array, "..."]:
    """Return the entry at each index; a table of two axes has one column per channel.

    Args:
        table: The entries.
        index: Indices within the entries; channels are the last axis.
    """
    if table.ndim == 1:
        return jnp.take(table, index, mode="clip")
    channels = table.shape[1]
    return jnp.take(
        table.reshape(-1), index * channels + np.arange(channels, dtype=np.int32), mode="clip"
    )
