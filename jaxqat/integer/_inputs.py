# pyright: strict
"""The arrays that a network reads, and their places among the arguments of a call."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from jaxqat.integer._results import check_places

InputType = Literal["float32", "int32", "uint8", "bool"]
Path = tuple[str | int, ...]

FIRST: Path = (0,)
INPUT = "<input>"
"""By this name nodes read the first argument, if it is an array."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One array that a network reads.

    Attributes:
        shape: Its shape, without the batch.
        type: Type of the model's own input; that of tokens is int32. A network takes uint8 in place
            of float32 too if the `Quantize` node that reads it has a table.
        path: Its place among the arguments of the call: the position of an argument or the name of
            a keyword, then positions of tuples and keys of dictionaries in it.
    """

    shape: tuple[int, ...]
    type: InputType = "float32"
    path: Path = FIRST

    @property
    def name(self) -> str:
        """The name by which nodes read it."""
        return INPUT if self.path == FIRST else f"<input {self}>"

    def __str__(self) -> str:
        plain = (type(key) is int or str(key).isidentifier() for key in self.path)
        keys = zip(self.path, plain, strict=True)
        return "/".join(str(key) if is_plain else repr(key) for key, is_plain in keys)


def check_inputs(inputs: Sequence[Input]) -> None:
    """Check that each input has a place of its own among the arguments.

    Raises:
        ValueError: If not, or if there is none; names the place.
    """
    if not inputs:
        raise ValueError("a network reads one array or more")
    if any(not each.path for each in inputs):
        raise ValueError("the place of an input begins with an argument, got ()")
    # Positions and keywords may be beside each other, as they may not in a result.
    for kind in (int, str):
        if paths := [each.path for each in inputs if type(each.path[0]) is kind]:
            check_places(paths)


def needed(
    inputs: Sequence[Input], arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a model's call without those that its network does not read."""
    names = {each.path[0] for each in inputs}
    kept = {key: value for key, value in keywords.items() if key in names}
    return tuple(arguments[: _positions(inputs)]), kept


def arrays_of(
    inputs: Sequence[Input], arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> list[Any]:
    """Return the array of each input, from the arguments of a call.

    Raises:
        ValueError: The call has more or fewer arguments, or one lacks an array; names the place.
    """
    count = _positions(inputs)
    names = sorted({first for first in (each.path[0] for each in inputs) if isinstance(first, str)})
    if len(arguments) != count or sorted(keywords) != names:
        is_list = len(arguments) == 1 and isinstance(arguments[0], list) and count > 1
        raise ValueError(
            f"the network takes {_listed(count, names)}, those of the model that it reads, got "
            f"{_listed(len(arguments), list(keywords))}"
            f"{': a list is one argument, a tuple are several' if is_list else ''}"
        )
    return [_array(each, arguments, keywords) for each in inputs]


def check_batch(inputs: Sequence[Input], arrays: Sequence[Any]) -> None:
    """Check that all inputs have one size of the batch.

    Raises:
        ValueError: If not; names the sizes.
    """
    sizes = {str(each): x.shape[0] for each, x in zip(inputs, arrays, strict=True)}
    if len({str(size) for size in sizes.values()}) > 1:
        raise ValueError(f"the inputs must have one size of the batch, got {sizes}")


def _positions(inputs: Sequence[Input]) -> int:
    return 1 + max((i.path[0] for i in inputs if isinstance(i.path[0], int)), default=-1)


def _listed(count: int, names: Sequence[str]) -> str:
    arguments = f"{count} argument{'' if count == 1 else 's'}"
    return f"{arguments} and {', '.join(names)}" if names else arguments


def _array(each: Input, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    first, *rest = each.path
    value = arguments[first] if isinstance(first, int) else keywords[first]
    for depth, key in enumerate(rest):
        try:
            value = _part(value, key)
        except (LookupError, TypeError, AttributeError) as error:
            where = "/".join(map(str, each.path[: depth + 1]))
            raise ValueError(
                f"argument {where} has no {key!r}, where the network reads the input {each}"
            ) from error
    if isinstance(value, Mapping):
        raise ValueError(f"argument {each} must be an array, got a dictionary")
    return value


def _part(value: Any, key: str | int) -> Any:
    if isinstance(value, Mapping):
        by_name = {str(k): part for k, part in cast("Mapping[Any, Any]", value).items()}
        return by_name[str(key)]
    return getattr(value, key) if isinstance(key, str) else value[key]
