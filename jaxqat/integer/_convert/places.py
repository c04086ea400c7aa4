# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The places of arrays among a model's arguments and in its result."""

from typing import Any

import jax.numpy as jnp
from jax.tree_util import SequenceKey

from jaxqat.integer._inputs import Input, InputType
from jaxqat.quant._trace.arguments import array_paths, key_of

Place = tuple[str | int, ...]


def result_place(path: tuple[Any, ...]) -> Place | None:
    """Return a place in the model's result from a path in (result, new variables)."""
    number, *keys = path
    return _plain(keys) if number.idx == 0 else None


def argument_places(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> list[Place]:
    """Return the place of each array among the arguments of a call."""
    return [_plain(path[1:]) for path in array_paths((inputs, keywords))]


def input_at(place: Place, values: Any) -> Input:
    """Return the input of a network for an array at a place."""
    kind: InputType = "float32"
    if values.dtype == jnp.bool_:
        kind = "bool"
    elif not jnp.issubdtype(values.dtype, jnp.floating):
        kind = "uint8" if values.dtype == jnp.uint8 else "int32"
    return Input(shape=tuple(values.shape[1:]), type=kind, path=place)


def _plain(keys: Any) -> Place:
    return tuple(k.idx if isinstance(k, SequenceKey) else key_of((k,))[0] for k in keys)
