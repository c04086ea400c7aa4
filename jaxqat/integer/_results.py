# pyright: strict
"""The arrays that a network returns, and their places in its result."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

MAX_PLACES = 10_000  # In a tuple of a result.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """One array of a network's result.

    Attributes:
        name: Name of the tensor: a tensor of codes, whose real values are returned, or a real one.
        shape: Its shape, without the batch.
        path: Its place in the result, outermost first: positions of tuples and keys of
            dictionaries; empty if the result is one array. What is neither a tuple nor a list in
            the model, such as a dataclass, is a dictionary here.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str | int, ...] = ()

    def __str__(self) -> str:
        return "/".join(map(str, self.path))


def check_places(paths: Sequence[tuple[object, ...]]) -> None:
    """Check that arrays have places of their own in one result.

    Raises:
        ValueError: If not; names the place.
    """
    if not paths or len(set(paths)) != len(paths):
        raise ValueError(f"the places of results must be unique, got {list(paths)}")
    for path in paths:
        inside = [p for p in paths if p != path and p[: len(path)] == path]
        depth = len(path)
        beside = [
            p[depth - 1] for p in paths if len(p) >= depth > 0 and p[: depth - 1] == path[:-1]
        ]
        mixed = len({isinstance(key, str) for key in beside}) > 1
        if not all(map(_is_key, path)) or inside or mixed:
            raise ValueError(f"{path} cannot be the place of a result among {list(paths)}")


def _is_key(key: object) -> bool:
    return isinstance(key, str) or (type(key) is int and 0 <= key < MAX_PLACES)


def nested(outputs: Sequence[Output], arrays: Sequence[Any]) -> Any:
    """Return arrays, one for each output, in their places in the result."""
    return _at([(output.path, array) for output, array in zip(outputs, arrays, strict=True)])


def _at(items: Sequence[tuple[tuple[str | int, ...], Any]]) -> Any:
    if not items[0][0]:
        return items[0][1]
    keys = list(dict.fromkeys(path[0] for path, _ in items))
    parts = {k: _at([(path[1:], x) for path, x in items if path[0] == k]) for k in keys}
    if not all(isinstance(key, int) for key in keys):
        return parts
    positions = cast("list[int]", keys)
    return tuple(parts.get(index) for index in range(max(positions) + 1))


def flat(outputs: Sequence[Output], result: Any) -> list[Any]:
    """Return the arrays of a result in the order of the outputs."""

    def found(output: Output) -> Any:
        array = result
        for key in output.path:
            array = array[key]
        return array

    return [found(output) for output in outputs]
