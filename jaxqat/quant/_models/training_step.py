# pyright: strict, reportUnknownMemberType=false
"""Compile a training step so that it is fast on a CPU, too."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator
from importlib.metadata import version
from typing import Any

import flax.linen as nn
import jax

from jaxqat.quant._numerics import cpu


class StepWarning(UserWarning):
    """A training step is compiled in XLA's usual way, which may be slow."""


def jit_step(step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return `jax.jit(step, **options)`, compiled on a CPU so that convolutions train fast.

    On a CPU, XLA compiles gradients of convolutions to slow code by default. Here they take
    another library, convolutions of codes are computed in float32 (or as products of s8
    matrices, if the processor has units for them: AMX), and what convolutions read is computed
    once. Sums of codes are integers, so they stay the same; float sums are added in another
    order, which changes the last bits of gradients. This holds for convolutions of
    quantized models and of Linen's float models. A function jitted and called before this step is
    not affected. On other devices this is `jax.jit`.

    The step must contain the gradient, as `jax.value_and_grad` within it does.

    Args:
        step: A training step.
        **options: Of `jax.jit`.

    Warns:
        StepWarning: This version of jaxlib lacks the compiler options, so the step is compiled in
            the usual way.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(step, **options)
    if not is_supported():
        warnings.warn(
            f"jaxlib {version('jaxlib')} has no compiler options {', '.join(cpu.OPTIONS)}: "
            "the training step is compiled in XLA's usual way.",
            StepWarning,
            stacklevel=2,
        )
        return jax.jit(step, **options)

    @functools.wraps(step)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with fast_on_cpu():
            return step(*args, **kwargs)

    given: dict[str, Any] = options.pop("compiler_options", None) or {}
    return jax.jit(traced, compiler_options={**cpu.OPTIONS, **given}, **options)


@contextlib.contextmanager
def fast_on_cpu() -> Generator[None]:
    """Trace training steps in the form that is fast on a CPU, for Linen's float models too."""
    with cpu.form(), nn.intercept_methods(_store_input):
        yield


@functools.cache
def is_supported() -> bool:
    """Return whether this version of jaxlib has the compiler options."""
    function: Any = jax.jit(lambda x: x)  # pyright: ignore[reportUnknownLambdaType]
    try:
        function.lower(0.0).compile(compiler_options=dict(cpu.OPTIONS))
    except RuntimeError:  # XLA's JaxRuntimeError: no such option, or no such value of it.
        return False
    return True


def _store_input(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
) -> Any:
    if isinstance(context.module, nn.Conv) and context.method_name == "__call__" and args:
        args = (cpu.store(args[0]), *args[1:])
    return call(*args, **kwargs)
