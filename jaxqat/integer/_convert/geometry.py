"""The geometry of the trace's operations, in the terms of the integer graph.

Each function reads the parameters of a JAX primitive and refuses, with the reason, what the graph
has no node for.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxqat.errors import InputError
from jaxqat.integer import graph as g
from jaxqat.quant._forms.forms import Operation

Shape = tuple[int, ...]


class UnconvertibleError(InputError):
    """A part of a model has no integer form; the message names it and the reason."""


def pool_fields(operation: Operation, shape: tuple[int, ...], where: str) -> dict[str, Any]:
    """Return the window of a sum over spatial axes."""
    params, rank = operation.params, len(shape)
    if operation.name == "copy":  # Each element is a sum of one.
        ones, nothing = (1,) * (rank - 2), ((0, 0),) * (rank - 2)
        return {"window": ones, "strides": ones, "padding": nothing, "drop_axes": False}
    if operation.name == "reduce_sum":
        if tuple(sorted(params["axes"])) != tuple(range(1, rank - 1)):
            raise UnconvertibleError(
                f"{where}: sums over the axes {tuple(params['axes'])}, not the spatial ones"
            )
        window = tuple(shape[1:-1])
        nothing = ((0, 0),) * len(window)
        return {"window": window, "strides": window, "padding": nothing, "drop_axes": True}
    return {**_window_fields(operation, where), "drop_axes": False}


def _window_fields(operation: Operation, where: str) -> dict[str, Any]:
    params = operation.params
    window, strides = params["window_dimensions"], params["window_strides"]
    padding = params["padding"]
    dilated = any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"]))
    outer = (window[0], window[-1], strides[0], strides[-1])
    if dilated or outer != (1, 1, 1, 1) or any((*padding[0], *padding[-1])):
        raise UnconvertibleError(f"{where}: its window is dilated, or not of spatial axes alone")
    return {
        "window": tuple(map(int, window[1:-1])),
        "strides": tuple(map(int, strides[1:-1])),
        "padding": tuple((int(low), int(high)) for low, high in padding[1:-1]),
    }


class Step(NamedTuple):
    """One node of a move.

    Attributes:
        kind: Class of the node.
        fields: Its fields, without names; indices may be an array of the program.
        shape: Shape of its result, without the batch.
    """

    kind: type[g.Node]
    fields: dict[str, Any]
    shape: Shape


def move_steps(operation: Operation, before: Shape, after: Shape, where: str) -> list[Step]:
    """Return the nodes for an operation that moves or picks elements.

    Args:
        operation: The operation.
        before: Shape of what it reads, with the batch.
        after: Shape of its result, with the batch.
        where: Name of the result, for messages.
    """
    name, params = operation.name, operation.params
    if name == "reduce_window_max":
        return [Step(g.MaxPool, _window_fields(operation, where), after[1:])]
    if before[0] != after[0]:
        raise UnconvertibleError(f"{where}: {name!r} changes the batch axis {before} -> {after}")
    if name == "reduce_max":
        window = before[1:-1]
        fields = {"window": window, "strides": window, "padding": ((0, 0),) * len(window)}
        one = (*(1,) * len(window), before[-1])
        return [Step(g.MaxPool, fields, one), *_reshape(one, after[1:])]
    if name == "take":
        return [_take(params["axis"], params["indices"], after[1:], where)]
    if name == "broadcast_in_dim":
        return _broadcast(params["broadcast_dimensions"], before, after, where)
    if name in ("reshape", "squeeze", "expand_dims"):
        if name == "reshape" and params.get("dimensions") is not None:
            raise UnconvertibleError(f"{where}: {name!r} permutes axes, {before} -> {after}")
        return [Step(g.Move, {"kind": "reshape", "shape": after[1:]}, after[1:])]
    fields = _MOVES[name](params) if name in _MOVES else None
    if fields is None:
        raise UnconvertibleError(f"{where}: {name!r} with {params} has no node")
    return [Step(g.Move, fields, after[1:])]


def _take(axis: int, indices: Any, after: Shape, where: str) -> Step:
    if axis == 0:
        raise UnconvertibleError(f"{where}: picks elements of the batch")
    return Step(g.Move, {"kind": "take", "axis": int(axis), "indices": indices}, after)


def _reshape(before: Shape, after: Shape) -> list[Step]:
    if before == after:
        return []
    return [Step(g.Move, {"kind": "reshape", "shape": after}, after)]


def _broadcast(axes: Sequence[int], before: Shape, after: Shape, where: str) -> list[Step]:
    """Return a reshaping that makes axes of size 1, and a repetition along each axis."""
    if axes[0] != 0:
        raise UnconvertibleError(f"{where}: the batch becomes another axis, {before} -> {after}")
    shape = [1] * len(after)
    for axis, size in zip(axes, before, strict=True):
        shape[axis] = size
    steps = _reshape(before[1:], tuple(shape[1:]))
    for axis in range(1, len(after)):
        if shape[axis] != after[axis]:
            shape[axis] = after[axis]
            steps.append(_take(axis, (0,) * after[axis], tuple(shape[1:]), where))
    return steps or [Step(g.Move, {"kind": "reshape", "shape": after[1:]}, after[1:])]


def _transpose(params: dict[str, Any]) -> dict[str, Any] | None:
    axes = tuple(map(int, params["permutation"]))
    return {"kind": "transpose", "axes": axes} if axes[0] == 0 else None


def _reverse(params: dict[str, Any]) -> dict[str, Any] | None:
    axes = tuple(map(int, params["dimensions"]))
    return {"kind": "reverse", "axes": axes} if 0 not in axes else None


def _slice(params: dict[str, Any]) -> dict[str, Any] | None:
    starts, stops = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(starts)
    if strides[0] != 1:
        return None
    return {
        "kind": "slice",
        "starts": tuple(map(int, starts)),
        "stops": (-1, *map(int, stops[1:])),
        "strides": tuple(map(int, strides)),
    }


def _pad(params: dict[str, Any]) -> dict[str, Any] | None:
    config = params["padding_config"]
    if any(low < 0 or high < 0 or inner for low, high, inner in config) or any(config[0]):
        return None
    return {"kind": "pad", "padding": tuple((int(low), int(high)) for low, high, _ in config)}


_MOVES: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
    "transpose": _transpose,
    "rev": _reverse,
    "slice": _slice,
    "pad": _pad,
}
