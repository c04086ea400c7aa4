"""The library's own arithmetic under JAX's default promotion of types and ranks.

JAX can be told to refuse implicit promotion (`jax_numpy_dtype_promotion="strict"`,
`jax_numpy_rank_promotion="raise"`), to find mistakes in a program. That is for the user's model,
which is traced with the user's settings. The library, and AQT inside of it, rely on the defaults
(a scale times a tensor, a bias added to sums); with them the numbers are the same to the bit
whatever is set.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")


def default_promotion(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function, run and traced with JAX's default promotion.

    Backward passes need it as well: JAX traces them later, outside of the forward pass.
    """

    @functools.wraps(function)
    def with_defaults(*args: P.args, **kwargs: P.kwargs) -> T:
        # Entered only if needed: a context of its own is a key of its own in JAX's caches.
        if _is_default():
            return function(*args, **kwargs)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return with_defaults


def _is_default() -> bool:
    config: Any = jax.config  # Its attributes are made at run time.
    types, ranks = config.jax_numpy_dtype_promotion, config.jax_numpy_rank_promotion
    return (types, ranks) == ("standard", "allow")
