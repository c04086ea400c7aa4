"""Refuse second derivatives: a straight-through estimator has none."""

import jax
from jaxtyping import Array, Float

from jaxqat.errors import QuantizationError


@jax.custom_jvp
def first_order(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x; raise QuantizationError if it is differentiated.

    Forward passes of straight-through estimators apply it to their input. A first derivative
    calls only the backward pass; a second one differentiates the forward pass as well. That would
    give zeros, as codes are integers.
    """
    return x


@first_order.defjvp
def _refuse(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    raise QuantizationError(
        "Second derivatives of a quantized model are not defined: the straight-through estimator "
        "gives rounding the derivative 1 and no second one. Differentiate the float model instead, "
        "or keep what you differentiate twice outside of the quantized model."
    )
