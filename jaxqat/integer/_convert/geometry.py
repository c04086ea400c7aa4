"""The geometry of the trace's operations, in the terms of the integer graph.

Each function reads the parameters of a JAX primitive and refuses, with the reason, what the graph
has no node for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxqat.errors import InputError
from jaxqat.integer import graph as g
from jaxqat.quant._forms.forms import Operation


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


def move_fields(
    operation: Operation, before: tuple[int, ...], after: tuple[int, ...], where: str
) -> tuple[type[g.Node], dict[str, Any]]:
    """Return the node for an operation that moves or picks elements, and its fields."""
    name, params = operation.name, operation.params
    if name == "reduce_window_max":
        return g.MaxPool, _window_fields(operation, where)
    if before[0] != after[0]:
        raise UnconvertibleError(f"{where}: {name!r} changes the batch axis {before} -> {after}")
    if name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
        permutes = name == "reshape" and params.get("dimensions") is not None
        if permutes or np.prod(before) != np.prod(after):
            raise UnconvertibleError(f"{where}: {name!r} repeats elements, {before} -> {after}")
        return g.Move, {"kind": "reshape", "shape": tuple(after[1:])}
    fields = _MOVES[name](params) if name in _MOVES else None
    if fields is None:
        raise UnconvertibleError(f"{where}: {name!r} with {params} has no node")
    return g.Move, fields


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
