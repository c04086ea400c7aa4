"""Float operations that every program rounds the same way, and every CPU.

Training, conversion and inference are different compiled programs. A compiler that contracts or
rewrites a float operation in one of them, but not in the others, changes the last bit of a bias
or a multiplier, and so a few codes in a million. These functions keep it from doing so. (On GPUs,
XLA approximates roots and quotients: their last bits differ from those on CPUs.)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def uncontracted(product: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return a product that no compiler fuses with a later addition into one multiply-add.

    Contracted or not, the last bit differs, and with it the rounded bias of one channel in a
    thousand. The bounds change only infinities, and stand between product and addition.
    """
    largest = np.finfo(np.float32).max
    return jnp.clip(product, -largest, largest)


def quotient(values: Float[Array, "..."], divisor: Float[Array, ""]) -> Float[Array, "..."]:
    """Return values / divisor, correctly rounded in every program.

    XLA may replace a division by one broadcast number with a product with its reciprocal, which
    differs in the last bit for two channels in five. It cannot see through the barrier.
    """
    return values / jax.lax.optimization_barrier(jnp.broadcast_to(divisor, jnp.shape(values)))


def root(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the square root, correctly rounded, also where it divides.

    XLA replaces 1 / sqrt(x) with an approximation of the reciprocal root, in whose last bit CPUs
    differ. It cannot see through the barrier.
    """
    return jax.lax.optimization_barrier(jnp.sqrt(values))


def reciprocal_root(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return 1 / sqrt(values), of two correctly rounded operations."""
    return 1 / root(values)


def scaled(
    values: Float[Array, "..."], shifts: ArrayLike, factors: ArrayLike, terms: ArrayLike
) -> Float[Array, "..."]:
    """Return (values + shifts) * factors + terms, each operation rounded by itself."""
    return uncontracted((values + shifts) * factors) + terms
