"""Form rules: the integer form of an operation's result, given the forms of what it reads.

Each rule takes the operation, its operands (at least one of them has a form) and the shape of the
result, and returns the form of the result, or None if there is none. `primitives` says which
primitive has which rule.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode
from jaxtyping import Array

from jaxqat.quant._forms.accumulators import FINE, Accumulator, Multiplied, Summed
from jaxqat.quant._forms.forms import (
    Clamp,
    Codes,
    Form,
    Joined,
    Moved,
    Operation,
    Real,
    Scaled,
    Sum,
    Times,
    are_codes,
)
from jaxqat.quant._forms.operand import Operand, is_channelwise, is_number
from jaxqat.quant._numerics.grids import stretched

Shape = tuple[int, ...]
_COPY = Operation("copy", {}, lambda x: x)
FormRule = Callable[[Operation, list[Operand], Shape], Form | None]


def same(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of a result with the operand's own values (cast, copy)."""
    del operation, shape
    return operands[0].form


def moved(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of moved or picked elements: the operation on codes, or on rounded values."""
    del shape
    form = operands[0].form
    if form is None:
        return None
    if isinstance(form, Codes):
        return Codes(operation.bind(form.codes), form.grid, moved=(operation, form))
    return Moved(form, operation)


def reshaped(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of elements in another shape, in the same order.

    Back in its first shape, a tensor has its first form: `jax.vmap` puts an axis of size 1 into
    what a convolution makes, and removes it again.
    """
    form = operands[0].form
    inner = form.inner if isinstance(form, Moved) and form.is_reshape else None
    if isinstance(inner, Accumulator) and inner.total.shape == tuple(shape):
        return inner
    found = moved(operation, operands, shape)
    return dataclasses.replace(found, is_reshape=True) if isinstance(found, Moved) else found


def taken(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of elements at constant indices along one axis (repetition, resizing)."""
    x, indices = operands
    if x.values is None or not indices.constant or indices.values is None:
        return None
    axis = _axis_of_take(operation.params, x.values.shape, jnp.shape(indices.values), shape)
    if axis is None:
        return None
    last, fill = x.values.shape[axis] - 1, operation.params.get("fill_value")
    if fill is not None and not np.isnan(fill):
        return None  # Places beyond the end have this value, which may have no code.
    where = jnp.ravel(indices.values)
    if operation.params["mode"] is not GatherScatterMode.FILL_OR_DROP:
        where = jnp.clip(where, 0, last)
    take = Operation(
        "take",
        {"axis": axis, "indices": where, "last": last},
        lambda values: jnp.take(values, where, axis, mode="clip"),
    )
    return moved(take, operands, shape)


def _axis_of_take(
    params: dict[str, Any], before: Shape, indices: Shape, after: Shape
) -> int | None:
    """Return the only axis along which a gather picks elements; None if there is another one."""
    numbers, rank = params["dimension_numbers"], len(before)
    if len(numbers.start_index_map) != 1 or len(after) != rank:
        return None
    (axis,) = numbers.start_index_map
    others = tuple(i for i in range(rank) if i != axis)
    plain = (numbers.collapsed_slice_dims, numbers.offset_dims) == ((axis,), others)
    whole = tuple(1 if i == axis else n for i, n in enumerate(before))
    batched = numbers.operand_batching_dims or numbers.start_indices_batching_dims
    if not plain or batched or tuple(params["slice_sizes"]) != whole:
        return None
    return axis if indices == (after[axis], 1) else None


def picked(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of the largest elements, as of windows."""
    found = moved(operation, operands, shape)
    return dataclasses.replace(found, is_largest=True) if isinstance(found, Moved) else found


def largest(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of the maximum over all spatial axes: it is picked from codes."""
    values = operands[0].values
    spatial = () if values is None else tuple(range(1, values.ndim - 1))
    if not spatial or tuple(sorted(operation.params["axes"])) != spatial:
        return None
    return picked(operation, operands, shape)


def transposed(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of a tensor with other axes: of a product, a product."""
    form = operands[0].form
    if isinstance(form, Accumulator) and isinstance(form.source, Multiplied):
        return form.transposed(form.source, tuple(operation.params["permutation"]))
    return moved(operation, operands, shape)


def padded(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of a tensor with zeros around: around codes, their zero point."""
    del shape
    form, fill = operands[0].form, operands[1]
    if form is None or not fill.constant or not is_number(fill.values, 0.0):
        return None
    if isinstance(form, Codes):
        return _padded(form, operation)

    def bind(units: Array) -> Array:
        return operation.bind(units, jnp.float32(0))

    return Moved(form, Operation(operation.name, operation.params, bind))


def _padded(form: Codes, operation: Operation) -> Codes:
    codes = operation.bind(form.codes, form.grid.zero.astype(jnp.int8))
    return Codes(codes, form.grid, moved=(operation, form))


def joined(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of tensors side by side: each of them is rounded to the common grid.

    A constant beside codes, such as the class token of a transformer, is added to padded codes.
    """
    if any(operand.constant for operand in operands):
        found = _beside_constants(operation, operands, shape)
        if found is not None:
            return found
    parts = tuple(form for operand in operands if (form := operand.any_form) is not None)
    return Joined(parts, operation) if len(parts) == len(operands) else None


def _beside_constants(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    axis = operation.params["dimension"]
    places = [place for place, operand in enumerate(operands) if not operand.constant]
    form = _scalable(operands[places[0]].form)
    if len(places) != 1 or not isinstance(form, Accumulator) or axis == 0:
        return None
    terms: list[Array] = []
    for place, operand in enumerate(operands):
        term = operand.of_one_example(len(shape))
        if place == places[0]:
            term = jnp.zeros((1, *form.total.shape[1:]))
        if term is None:
            return None
        terms.append(jax.lax.stop_gradient(jnp.asarray(term, jnp.float32)))
    sizes = [term.shape[axis] for term in terms]
    edges = [(0, 0, 0)] * len(shape)
    edges[axis] = (sum(sizes[: places[0]]), sum(sizes[places[0] + 1 :]), 0)
    around = _with_zeros(form, edges)
    return None if around is None else around.plus(jnp.concatenate(terms, axis))


def _with_zeros(form: Accumulator, edges: list[tuple[int, int, int]]) -> Accumulator | None:
    """Return codes with coefficients, and zeros around; None if the form is another one."""
    form = form.finer() if _takes_places(form) else form
    source, shape = form.source, (1, *form.total.shape[1:])
    if not isinstance(source, Summed) or source.weight != FINE:
        return None

    def pad(values: Array, fill: Any) -> Array:
        return jax.lax.pad(values, jnp.asarray(fill, values.dtype), edges)

    def spread(values: Array, fill: float) -> Array:
        return pad(jnp.broadcast_to(values, shape), fill) if values.ndim else values

    codes = _padded(source.codes, Operation("pad", {"padding_config": edges}, pad))
    return dataclasses.replace(
        form,
        total=pad(form.total, 0),
        weight_scale=spread(form.weight_scale, 1 / FINE),
        offset=spread(form.offset, 0),
        source=dataclasses.replace(source, codes=codes),
    )


def summed(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of a sum of elements: an int32 accumulator of codes."""
    del shape
    form = operands[0].form
    if not isinstance(form, Codes):
        return None
    return _accumulated(operation, form)


def _accumulated(operation: Operation, form: Codes) -> Accumulator:
    total = operation.bind(form.codes.astype(jnp.int32) - form.grid.zero.astype(jnp.int32))
    source = Summed(operation, form)
    nothing = jnp.float32(0)
    return Accumulator(total, jnp.int32(0), form.grid.scale, jnp.float32(1), nothing, source)


def dropped_out(operation: Operation, form: Form | None, factor: float) -> Form | None:
    """Return the form of dropout of codes: dropped ones are the zero point, the scale is larger.

    Args:
        operation: Selects between the codes, its first operand, and the zero point.
        form: Form of the tensor before dropout.
        factor: 1 / (1 - p), for the probability p to drop an element.
    """
    if not isinstance(form, Codes):
        return None
    zeros = jnp.full(form.codes.shape, form.grid.zero, jnp.int8)
    codes = operation.bind(form.codes, zeros)
    return Codes(codes, stretched(form.grid, factor), moved=(operation, form))


def at_least(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of the maximum of a tensor and a number, as in ReLU."""
    del operation, shape
    found = _with_number(operands)
    return None if found is None else Clamp(found[0], low=found[1])


def at_most(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of the minimum of a tensor and a number, as in ReLU6."""
    del operation, shape
    found = _with_number(operands)
    return None if found is None else Clamp(found[0], high=found[1])


def _with_number(operands: list[Operand]) -> tuple[Form, float] | None:
    """Return a form and the number on the other side of it."""
    for operand, bound in (operands, operands[::-1]):
        if operand.form is not None and bound.constant and is_number(bound.values):
            return operand.form, float(bound.values)  # pyright: ignore[reportArgumentType]
    return None


def negated(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of -x, x an accumulator or an input."""
    del operation, shape
    form = operands[0].form
    if not isinstance(form, Accumulator | Real | Scaled):
        return None
    found = _scalable(form)
    return None if found is None else found.times(jnp.float32(-1))


def multiplied(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of x * c, c a constant; or of a product of two tensors."""
    found = _with_coefficients(operands, shape)
    if found is not None:
        return found[0].times(found[1])
    left, right = (operand.form for operand in operands)
    if isinstance(left, Moved) or isinstance(right, Moved):
        return _before_the_move(multiplied, operation, operands)
    if isinstance(left, Codes) and isinstance(right, Codes):
        return Times(left, right) if all(o.holds is True for o in operands) else None
    return None


def divided(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of x / c, c a constant."""
    found = _with_coefficients(operands, shape)
    if found is None:
        return _before_the_move(divided, operation, operands)
    form, divisor, is_left = found
    return form.times(1.0 / divisor) if is_left else None


def subtracted(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of x - c or c - x, c a constant."""
    del operation
    found = _with_coefficients(operands, shape)
    if found is None:
        return None
    form, term, is_left = found
    # -(x - c), as c - x: of large numbers, this difference may be exact.
    return form.plus(-term) if is_left else form.plus(-term).times(jnp.float32(-1))


def added(operation: Operation, operands: list[Operand], shape: Shape) -> Form | None:
    """Return the form of x + c, c a constant; or of a residual addition."""
    found = _with_coefficients(operands, shape)
    if found is not None:
        return found[0].plus(found[1])
    left, right = (operand.any_form for operand in operands)
    if left is None or right is None or any(o.constant for o in operands):
        return None
    if are_codes(left) and are_codes(right):
        return Sum(left, right)
    values = [operand.values for operand in operands if operand.values is not None]
    return Sum(left, right, operation.bind(*values)) if len(values) == 2 else None


def _before_the_move(rule: FormRule, operation: Operation, operands: list[Operand]) -> Form | None:
    """Return the form of a moved tensor times or over a number, which is applied before it."""
    for place, (operand, other) in enumerate((operands, operands[::-1])):
        form, number = operand.form, other.values
        if not isinstance(form, Moved) or form.is_largest:
            continue
        inner = form.inner if isinstance(form.inner, Accumulator | Real | Scaled) else None
        if inner is None or not other.constant or number is None:
            continue
        if number.size == 1:
            reads = [Operand(jnp.reshape(number, ()), None, True)] * 2
            reads[place] = Operand(None, inner, False)
            shape = (inner.total if isinstance(inner, Accumulator) else inner.values).shape
            inner = rule(operation, reads, shape)
            return None if inner is None else Moved(inner, form.operation)
    return None


def _takes_places(form: Accumulator | Scaled) -> bool:
    """Return whether coefficients may differ by place: those of codes, and of an input."""
    if isinstance(form, Scaled):
        return True
    return isinstance(form.source, Summed) and form.source.operation is _COPY


def _is_by_channel(form: Accumulator | Scaled, shape: Shape) -> bool:
    """Return whether coefficients of this shape are one per channel, which may be several axes."""
    if _takes_places(form):
        return all(n == 1 for n in shape[:-1])
    assert isinstance(form, Accumulator)
    full = form.total.shape
    if is_channelwise(shape, full):
        return True
    if not isinstance(form.source, Multiplied) or len(shape) != len(full):
        return False
    varying = {axis for axis, n in enumerate(shape) if n != 1}
    return varying <= {*form.source.output_axes}


def _with_coefficients(
    operands: list[Operand], shape: Shape
) -> tuple[Accumulator | Scaled, Array, bool] | None:
    """Return an accumulator or input, the coefficients beside it, and whether it is on the left.

    Codes with coefficients are one too: each of them is a sum of one. Only theirs may differ by
    place, as a position embedding does, and those of an input; a layer's are one per channel.
    """
    for is_left, (operand, other) in ((True, operands), (False, operands[::-1])):
        form, values = _scalable(operand.form), other.values
        if form is None or not other.constant or values is None:
            continue
        before = form.values if isinstance(form, Scaled) else form.total
        if before.shape != tuple(shape):
            continue
        if not _is_by_channel(form, jnp.shape(values)):
            values = other.of_one_example(len(shape))
            if values is None or not _takes_places(form):
                continue
            form = form if isinstance(form, Scaled) else form.finer()
        return form, jax.lax.stop_gradient(jnp.asarray(values, jnp.float32)), is_left
    return None


def _scalable(form: Form | None) -> Accumulator | Scaled | None:
    """Return a form as one that coefficients can be applied to, if it is."""
    match form:
        case Codes() if form.codes.ndim > 1:
            return _accumulated(_COPY, form)
        case Real():
            return Scaled(form.values)
        case Accumulator() | Scaled():
            return form
        case _:
            return None
