"""What the fields of nodes are made of while the program is being traced."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

from jaxqat.quant import _forms as forms


@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that the program has yet to compute, and what to make of it then."""

    index: int
    finish: Callable[[np.ndarray], Any]


class Requirement(NamedTuple):
    """A condition on the program's numbers.

    Attributes:
        index: Its place in the arrays.
        reason: What is wrong where it does not hold.
        part: The average that is a product then; None if nothing can be done.
    """

    index: int
    reason: str
    part: str | None


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Clipping in real units, from operations such as ReLU and ReLU6."""

    low: float | None = None
    high: float | None = None

    def then(self, clamp: forms.Clamp) -> "Bounds | None":
        """Return these bounds behind a clamp, as one pair; None if they do not overlap."""
        low = max((b for b in (self.low, clamp.low) if b is not None), default=None)
        high = min((b for b in (self.high, clamp.high) if b is not None), default=None)
        return None if low is not None and high is not None and low > high else Bounds(low, high)

    def hold_zero(self) -> bool:
        """Return whether a real zero, as padding adds it, is within."""
        return (self.low is None or self.low <= 0) and (self.high is None or self.high >= 0)


def indices(value: Any) -> set[int]:
    """Return the indices of the arrays that a field waits for."""
    if isinstance(value, Deferred):
        return {value.index}
    parts = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else ()
    return set[int]().union(*map(indices, parts))


def finished(fields: dict[str, Any], values: list[np.ndarray]) -> dict[str, Any]:
    """Return fields with their arrays in the places of deferred ones."""

    def done(value: Any) -> Any:
        if isinstance(value, Deferred):
            return value.finish(values[value.index])
        if isinstance(value, tuple):
            return tuple(map(done, cast("tuple[Any, ...]", value)))
        return value

    return {key: done(value) for key, value in fields.items()}


def finished_node(fields: dict[str, Any], values: list[np.ndarray]) -> dict[str, Any]:
    """Return the fields of a node with their arrays."""
    node = finished(fields, values)
    node.pop("unbatched", None)
    signs = node.pop("weight_signs", None)
    if signs is not None:
        node["weights"] = node["weights"] * signs  # -1 negates a channel, 0 removes it.
    return node
