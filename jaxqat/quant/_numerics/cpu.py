"""The form in which a training step is fast on a CPU; its codes are those of any other form.

Two defaults of XLA's CPU backend make gradients of convolutions slow:

- One compiler option chooses the library of all convolutions, and with the default the kernel
  gradients of float convolutions are slow. With the other choice they are several times as fast,
  but s8 convolutions are slow, so convolutions of codes are computed in another way then. On a
  processor with matrix units for s8 (AMX) they are products of gathered windows of codes, which
  take a quarter of the time of a float32 convolution from 128 channels on. On any other one they
  are float32 convolutions. The sums are the same: they are integers, and float32 holds every
  integer up to 2**24. A convolution that could pass that is split (`cudnn.exact_parts`).
- What a convolution reads is computed again where its kernel gradient reads it: the operations
  since the last product are fused into a transposition, which cannot be vectorized then. `store`
  keeps them apart.
"""

import contextlib
import contextvars
from collections.abc import Generator, Mapping
from types import MappingProxyType
from typing import Any

from jax import lax

from jaxqat.quant._numerics.processor import features

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        # Without LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION.
        "xla_cpu_experimental_ynn_fusion_type": (
            "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
        ),
        # This pass would remove the barriers of `store` before operations are fused.
        "xla_disable_hlo_passes": "cse_barrier_expander",
    }
)

_ACTIVE: contextvars.ContextVar[bool] = contextvars.ContextVar("fast_on_cpu", default=False)


@contextlib.contextmanager
def form(active: bool = True) -> Generator[None]:
    """Trace in this form inside the block, or in the usual one.

    Programs in this form are compiled with `OPTIONS`.
    """
    token = _ACTIVE.set(active)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def is_active() -> bool:
    """Return whether programs are traced in this form."""
    return _ACTIVE.get()


def has_matrix_units() -> bool:
    """Return whether this processor multiplies matrices of s8 in units of its own."""
    return "amx_int8" in features()


def store(values: Any) -> Any:
    """Return arrays that are computed once and then read, however many operations use them."""
    return lax.optimization_barrier(values) if is_active() else values
