"""What an operation reads, and what its form rule asks about it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from jaxqat.quant._forms.forms import Either, Form, Real
from jaxqat.quant._trace.program import TracedNode


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """How a tensor was made: conversion writes it down where it has no integer form.

    Attributes:
        node: The operation.
        place: Which of its results the tensor is.
        operands: Returns what the operation read; of a layer, dequantized codes and weights.
    """

    node: TracedNode
    place: int
    operands: "Callable[[], Sequence[Operand]]"


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """What an operation reads: a tensor and its form.

    Attributes:
        values: The float tensor; None inside a call that stays whole.
        form: Its integer form, if it has one.
        constant: Whether it depends on parameters and constants only, never on the data.
        float_reason: The operation without an integer form before it, for messages.
        holds: Whether the form describes the values: where layers are switched (`Evaluator`), a
            boolean known when the program runs; else True.
        made: How it was made; None for arguments, constants, and inside a call that stays whole.
    """

    values: Array | None
    form: Form | None
    constant: bool
    float_reason: str | None = None
    holds: Any = True
    made: Made | None = None

    @property
    def any_form(self) -> Form | None:
        """The form, or the float tensor as one."""
        real = None if self.values is None else Real(self.values, self.float_reason, self)
        if self.form is None or self.holds is True or real is None:
            return self.form or real
        return Either(self.holds, self.form, real)

    def of_one_example(self, rank: int) -> Array | None:
        """Return a constant for one example, (1, ...), if it is the same for all; otherwise None.

        Args:
            rank: Number of axes of what it is combined with, the batch among them.
        """
        values = self.values
        if values is None or not self.constant or jnp.ndim(values) != rank or not rank:
            return None
        if values.shape[0] == 1 or self._repeats_examples():
            return values[:1]
        return None

    def _repeats_examples(self) -> bool:
        operands = () if self.made is None else self.made.operands()
        if self.made is None or self.values is None or not operands:
            return False
        before = operands[0]
        if before.values is None:
            return False
        shapes = jnp.shape(before.values), jnp.shape(self.values)
        return repeats_examples(self.made.node.equation, *shapes, before._repeats_examples)


def repeats_examples(
    equation: Any, before: tuple[int, ...], after: tuple[int, ...], is_repeated: Callable[[], bool]
) -> bool:
    """Return whether the result of an operation on a constant is the same along its first axis.

    Args:
        equation: The operation.
        before: Shape of the constant.
        after: Shape of the result.
        is_repeated: Returns whether the constant is.
    """
    params = equation.params
    if "broadcast_dimensions" in params:
        return params["broadcast_dimensions"][:1] != (0,) or before[0] == 1 or is_repeated()
    keeps_order = "new_sizes" in params or "new_dtype" in params  # A reshaping or a cast.
    return keeps_order and before[:1] == after[:1] and is_repeated()


def any_of(flags: Iterable[Any]) -> Any:
    """Return whether one flag is set: True where that is known already, else an array."""
    flags = list(flags)
    return True if any(f is True for f in flags) else functools.reduce(jnp.logical_or, flags)


def is_channelwise(shape: tuple[int, ...], output_shape: tuple[int, ...]) -> bool:
    """Return whether coefficients of this shape are one per channel of an output, or one in all."""
    if not shape:
        return True
    return len(shape) == len(output_shape) and sum(n != 1 for n in shape) <= 1


def is_number(values: Any, equal_to: float | None = None) -> bool:
    """Return whether this is a number known while tracing (and equal to the given one)."""
    if values is None or isinstance(values, Tracer) or jnp.ndim(values) != 0:
        return False
    return equal_to is None or float(values) == equal_to
