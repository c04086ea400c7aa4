"""Tensors that are repeated along an axis: two operations of the trace as one, and none."""

from typing import Any

import jax

from jaxqat.integer._convert.geometry import Shape
from jaxqat.integer._convert.layout import reshaped
from jaxqat.quant import _forms as forms
from jaxqat.quant._numerics.grids import Grid


def repetition(
    reshape: forms.Operation, broadcast: forms.Operation, shapes: tuple[Shape, Shape, Shape]
) -> forms.Operation | None:
    """Return a broadcast and a reshaping behind it as one operation, if it repeats along one axis.

    `jnp.repeat` and `jnp.tile` consist of the two: a new axis, which becomes part of its neighbour.

    Args:
        reshape: The second operation.
        broadcast: The first operation.
        shapes: Shapes before, between and after them, with the batch.
    """
    before, between, after = shapes
    if (reshape.name, broadcast.name) != ("reshape", "broadcast_in_dim"):
        return None
    new = {*range(len(between))} - {*broadcast.params["broadcast_dimensions"]}
    if len(new) != 1 or len(after) != len(before) or reshape.params.get("dimensions") is not None:
        return None
    (place,) = new
    times = between[place]
    if between[:place] + between[place + 1 :] != before:
        return None
    for axis in (place - 1, place):  # The neighbour before it, or behind it.
        if not 1 <= axis < len(before):
            continue
        size = before[axis]
        if after == (*before[:axis], size * times, *before[axis + 1 :]):
            each = [i for i in range(size) for _ in range(times)]
            indices = each if axis < place else [*range(size)] * times

            def bind(x: Any) -> Any:
                return reshape.bind(broadcast.bind(x))

            return forms.Operation("take", {"axis": axis, "indices": tuple(indices)}, bind)
    return None


def shape_of(form: forms.Form, grid: Grid) -> tuple[int, ...]:
    """Return the shape of a form's tensor, with the batch."""
    return tuple(jax.eval_shape(lambda: form.in_units(grid)).shape)


def unrepeating(
    moved: tuple[forms.Operation, forms.Codes], after: tuple[int, ...]
) -> tuple[forms.Operation, forms.Codes]:
    """Return a move of codes; a repetition of two operations is one, of the codes before both."""
    operation, between = moved
    if between.moved is None:
        return moved
    first, before = between.moved
    both = repetition(operation, first, (before.codes.shape, between.codes.shape, after))
    return moved if both is None else (both, before)


def unrepeated(codes: forms.Codes) -> forms.Codes:
    """Return codes before they were repeated, with an axis of size 1 for each repeated one."""
    if codes.moved is None or codes.moved[0].name != "broadcast_in_dim":
        return codes
    operation, before = codes.moved
    shape = [1] * codes.codes.ndim
    for axis, size in zip(
        operation.params["broadcast_dimensions"], before.codes.shape, strict=True
    ):
        shape[axis] = size
    before = unrepeated(before)
    if before.codes.shape == tuple(shape):
        return before
    return reshaped(before, tuple(shape))
