"""Layouts of products: the axes of the trace, and those of the graph, which has channels last."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqat.integer._convert.geometry import UnconvertibleError
from jaxqat.quant import _forms as forms

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a traced product becomes one of the graph.

    Attributes:
        data: Axes of the activations in the graph's order: (batch, ..., *inputs).
        inputs: How many of them, the last ones, the graph has as one.
        weights: Axes of the weights in the graph's order: (*window, *inputs, *outputs).
        result: Axes of the traced result in the graph's order: (batch, ..., *outputs).
        outputs: How many of them, the last ones, the graph has as one.
    """

    data: Axes
    inputs: int
    weights: Axes
    result: Axes
    outputs: int

    @property
    def is_plain(self) -> bool:
        """Whether the graph's result is the traced one."""
        return self.outputs == 1 and self.result == tuple(range(len(self.result)))

    def natural(self, traced: tuple[int, ...]) -> tuple[int, ...]:
        """Return the graph's shape of a result from the traced one."""
        shape = [traced[axis] for axis in self.result]
        return (*shape[: -self.outputs], math.prod(shape[-self.outputs :]))

    def by_channel(self, values: Any, traced: tuple[int, ...]) -> Any:
        """Return coefficients of the traced result as one for each channel; None if they are not.

        Args:
            values: The coefficients, as they broadcast over the traced result.
            traced: Its shape.
        """
        sizes = [traced[axis] for axis in self.result[-self.outputs :]]
        if values.ndim:
            values = jnp.transpose(values, self.result)
            if any(n != 1 for n in values.shape[: -self.outputs]):
                return None
            values = values.reshape(values.shape[-self.outputs :])
        return jnp.broadcast_to(values, sizes).reshape(-1)

    def arranged(self, codes: forms.Codes) -> forms.Codes:
        """Return the activations in the graph's layout."""
        codes = transposed(codes, self.data)
        if self.inputs == 1:
            return codes
        shape = codes.codes.shape
        return reshaped(codes, (*shape[: -self.inputs], math.prod(shape[-self.inputs :])))


def layout_of(product: Any, weights: Axes, data: Axes, axes: Axes | None) -> Layout:
    """Return the layout of a product.

    Args:
        product: The product.
        weights: Shape of its weights.
        data: Shape of its activations.
        axes: How the result was transposed afterwards; None if it was not.

    Raises:
        UnconvertibleError: If the graph has no product for it.
    """
    found = _of_conv(product) if product.kind == "conv" else _of_dense(product, weights, data)
    if axes is None:
        return found
    return dataclasses.replace(found, result=tuple(axes.index(axis) for axis in found.result))


def _of_conv(product: Any) -> Layout:
    numbers = product.params["dimension_numbers"]
    data, result = ((s[0], *s[2:], s[1]) for s in (numbers.lhs_spec, numbers.out_spec))
    outputs, inputs, *window = numbers.rhs_spec
    return Layout(tuple(data), 1, (*window, inputs, outputs), tuple(result), 1)


def _of_dense(product: Any, weights: Axes, data: Axes) -> Layout:
    contracting, batch = product.params["dimension_numbers"]
    if any(map(len, batch)):
        raise UnconvertibleError(
            f"its dot product multiplies matrices along the batch axes {tuple(map(tuple, batch))}"
        )
    side = product.weight_side
    summed, of_data = tuple(contracting[side]), tuple(contracting[1 - side])
    outputs = tuple(axis for axis in range(len(weights)) if axis not in summed)
    free = tuple(axis for axis in range(len(data)) if axis not in of_data)
    if not outputs or not summed:
        raise UnconvertibleError("its dot product has no sums, or one output without an axis")
    places = tuple(range(len(free) + len(outputs)))
    # The operand on the left has the first axes of the result.
    result = places if side == 1 else (*places[len(outputs) :], *places[: len(outputs)])
    return Layout((*free, *of_data), len(of_data), (*summed, *outputs), result, len(outputs))


def pair_of(form: forms.Paired) -> tuple[list[forms.Codes], dict[str, Any]]:
    """Return the operands of a product of two activations, batch first, and its axes.

    Raises:
        UnconvertibleError: The operands have no axis in common, such as the batch.
    """
    contracted, batched = form.dot.params["dimension_numbers"]
    if not batched[0]:
        raise UnconvertibleError(f"{form.path}: multiplies the batch's examples with each other")
    operands: list[forms.Codes] = []
    places: list[tuple[Axes, Axes]] = []
    sides = zip((form.left, form.right), contracted, batched, strict=True)
    for codes, summed, common in sides:
        order = (common[0], *(axis for axis in range(codes.codes.ndim) if axis != common[0]))
        operands.append(transposed(codes, order))
        places.append((tuple(map(order.index, summed)), tuple(map(order.index, common))))
    summed, common = zip(*places, strict=True)
    return operands, {"contracted": summed, "batched": common}


def arrange_weights(layout: Layout, kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return what puts the codes of weights into the graph's layout."""

    def arrange(array: np.ndarray) -> np.ndarray:
        codes = np.transpose(np.asarray(array, np.int8), layout.weights)
        if kind == "dense":
            codes = codes.reshape(math.prod(codes.shape[: layout.inputs]), -1)
        return np.ascontiguousarray(codes)

    return arrange


def conv_fields(product: Any, data: forms.Codes) -> tuple[forms.Codes, dict[str, Any]]:
    """Return what a convolution reads, and its geometry.

    What is dilated or cropped becomes moves before it: a transposed convolution reads a tensor with
    zeros between its pixels.

    Args:
        product: The convolution.
        data: Its activations, channels last.
    """
    params = product.params
    padding = [(int(low), int(high)) for low, high in params["padding"]]
    dilation = tuple(params["lhs_dilation"])
    if any(step != 1 for step in dilation):
        data = dilated(data, dilation)  # With zeros behind the last pixel too.
        pairs = zip(padding, dilation, strict=True)
        padding = [(low, high - (step - 1)) for (low, high), step in pairs]
    cropping = [(min(low, 0), min(high, 0)) for low, high in padding]
    fields = {
        "strides": tuple(params["window_strides"]),
        "padding": tuple((max(low, 0), max(high, 0)) for low, high in padding),
        "dilation": tuple(params["rhs_dilation"]),
        "groups": int(params["feature_group_count"]),
    }
    return padded(data, [(0, 0), *cropping, (0, 0)]), fields


def transposed(codes: forms.Codes, axes: Axes) -> forms.Codes:
    """Return codes with other axes."""
    if axes == tuple(range(len(axes))):
        return codes
    return _moved(codes, "transpose", {"permutation": axes}, lambda x: jnp.transpose(x, axes))


def reshaped(codes: forms.Codes, shape: tuple[int, ...]) -> forms.Codes:
    """Return codes in another shape."""
    return _moved(codes, "reshape", {"dimensions": None}, lambda x: x.reshape(shape))


def padded(codes: forms.Codes, padding: list[tuple[int, int]]) -> forms.Codes:
    """Return codes with zeros around; a negative number crops."""
    ends = [n + min(high, 0) for n, (_, high) in zip(codes.codes.shape, padding, strict=True)]
    starts = [max(-low, 0) for low, _ in padding]
    if any(starts) or ends != list(codes.codes.shape):
        params = {"start_indices": starts, "limit_indices": ends, "strides": None}
        codes = _moved(codes, "slice", params, lambda x: lax.slice(x, starts, ends))
    config = [(max(low, 0), max(high, 0), 0) for low, high in padding]
    if not any(low or high for low, high, _ in config):
        return codes
    zero = jnp.int8(0)  # Only shapes matter here.
    return _moved(codes, "pad", {"padding_config": config}, lambda x: lax.pad(x, zero, config))


def dilated(codes: forms.Codes, dilation: Axes) -> forms.Codes:
    """Return codes, channels last, with zeros between and behind the pixels of spatial axes.

    Args:
        codes: The codes.
        dilation: For each spatial axis, the distance from one pixel to the next.
    """
    batch, *sizes, channels = codes.codes.shape
    spread = [n for size in sizes for n in (size, 1)]
    padding = [pair for step in dilation for pair in ((0, 0), (0, step - 1))]
    codes = reshaped(codes, (batch, *spread, channels))
    codes = padded(codes, [(0, 0), *padding, (0, 0)])
    after = [size * step for size, step in zip(sizes, dilation, strict=True)]
    return reshaped(codes, (batch, *after, channels))


def batch_first(codes: forms.Codes) -> forms.Codes:
    """Return moved codes, made without tensors whose first axis is not the batch.

    A recurrent layer exchanges the axes of batch and time, and takes one time from the result. That
    is a slice of the codes before.
    """
    source, axes = _untransposed(codes)
    return transposed(source, axes) if _mixes_batch(codes) and axes[0] == 0 else codes


def _mixes_batch(codes: forms.Codes) -> bool:
    """Return whether an axis other than the batch comes first in between."""
    if codes.moved is None:
        return False
    operation, before = codes.moved
    exchanged = operation.name == "transpose" and operation.params["permutation"][0] != 0
    return exchanged or _mixes_batch(before)


def _untransposed(codes: forms.Codes) -> tuple[forms.Codes, Axes]:
    """Return codes and axes whose transposition are the given codes; moves come before it."""
    as_it_is = codes, tuple(range(codes.codes.ndim))
    if codes.moved is None:
        return as_it_is
    operation, before = codes.moved
    source, axes = _untransposed(before)
    if operation.name == "transpose":
        return source, tuple(axes[i] for i in operation.params["permutation"])
    if source is before:
        return as_it_is
    shape = before.codes.shape
    if operation.name == "slice":
        params = operation.params
        bounds = [params["start_indices"], params["limit_indices"], params["strides"]]
        order = [axes.index(axis) for axis in range(len(axes))]
        starts, stops, strides = (x and [x[i] for i in order] for x in bounds)
        moved = {"start_indices": starts, "limit_indices": stops, "strides": strides}
        return _moved(source, "slice", moved, lambda x: lax.slice(x, starts, stops, strides)), axes
    dropped = operation.params.get("dimensions") or [i for i, n in enumerate(shape) if n == 1]
    kept = [axis for i, axis in enumerate(axes) if i not in dropped]
    if operation.name not in ("reshape", "squeeze") or codes.codes.shape != tuple(
        source.codes.shape[axis] for axis in kept
    ):
        return as_it_is
    smaller = reshaped(source, tuple(source.codes.shape[axis] for axis in sorted(kept)))
    return smaller, tuple(sorted(kept).index(axis) for axis in kept)


def _moved(codes: forms.Codes, name: str, params: dict[str, Any], bind: Any) -> forms.Codes:
    operation = forms.Operation(name, params, bind)
    return forms.Codes(bind(codes.codes), codes.grid, moved=(operation, codes))
