# pyright: strict
"""The arrays that a network returns, and their places in its result."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast


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
