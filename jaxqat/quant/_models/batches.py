# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Batches of inputs, as `calibrate`, `analyze`, `verify` and `reestimate_batch_norm` take them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax

from jaxqat.errors import QuantizationError
from jaxqat.quant._trace.arguments import Call


def each_batch(batches: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator over batches.

    Raises:
        QuantizationError: They are one array, each row of which would be a batch.
    """
    shape = getattr(batches, "shape", None)
    if shape is not None:
        raise QuantizationError(
            f"`batches` is an array of the shape {tuple(shape)}, and each of its rows would be a "
            "batch: pass [array] if it is one batch, or list(array) if its first axis counts the "
            "batches."
        )
    return iter(batches)


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """Return the inputs of a batch: those of a tuple, or the batch as the only one."""
    return cast("tuple[Any, ...]", batch) if isinstance(batch, tuple) else (batch,)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled function whose last argument is a batch; of it only arrays are traced.

    All else in a batch, such as `False`, is static, as in a call of the model.
    """
    programs: dict[Any, Callable[..., Any]] = {}

    def run(*arguments: Any) -> Any:
        *others, batch = arguments
        call = Call.of((), (), batch)
        if call.static not in programs:

            def of_arrays(others: Any, arrays: Any) -> Any:
                return function(*others, call.rebuild(arrays)[2])

            programs[call.static] = jax.jit(of_arrays)
        return programs[call.static](tuple(others), call.flat)

    return run


def preparing(
    preprocess: Callable[..., Any] | None,
) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return what makes a model's arguments from the inputs of a batch."""
    if preprocess is None:
        return lambda inputs: inputs
    return lambda inputs: as_arguments(preprocess(*inputs))
