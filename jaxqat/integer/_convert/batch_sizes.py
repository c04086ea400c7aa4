"""Which numbers of a network depend on the size of the batch.

A trace has one size of the batch. A second one, of twice the size, shows the numbers that double.
"""

from typing import Any

import jax
import numpy as np

from jaxqat.errors import ConversionError


def batch_sizes(
    fields: dict[str, Any], doubled: dict[str, Any], batch: int, hint: str
) -> dict[str, Any]:
    """Return a node's fields, with what depends on the batch's size as multiples of it.

    Args:
        fields: Fields of a `FloatOp`, for a batch of this size.
        doubled: Fields of the same operation, for a batch of twice the size.
        batch: The size.
        hint: What the reason for errors may be.

    Raises:
        ConversionError: The operation mixes the examples of a batch, or depends on its size in
            another way.
    """
    name = fields["name"]
    if fields["unbatched"] != doubled["unbatched"]:
        raise ConversionError(
            f"{name}: '{fields['operation']}' mixes the examples of a batch, each of which an "
            f"integer network computes by itself. Leave it outside of the model.{hint}"
        )
    try:
        found = {key: _scaled(fields[key], doubled[key], batch) for key in ("attributes", "shape")}
    except ValueError:
        raise ConversionError(
            f"{name}: '{fields['operation']}' depends on the size of the batch: {fields['shape']} "
            f"for {batch} examples, {doubled['shape']} for {2 * batch}.{hint}"
        ) from None
    return {**fields, **found}


def _scaled(one: Any, two: Any, batch: int) -> Any:
    """Return a value in which integers that double with the batch are multiples of it."""
    if type(one) is not type(two):
        raise ValueError
    if isinstance(one, dict):
        return {key: _scaled(one[key], two[key], batch) for key in one}
    if isinstance(one, list):
        if len(one) != len(two):
            raise ValueError
        return [_scaled(a, b, batch) for a, b in zip(one, two, strict=True)]
    if one == two:
        return one
    if type(one) is int and two == 2 * one and one % batch == 0:
        return {"batch": one // batch}
    raise ValueError


def unlike(left: list[np.ndarray], right: list[jax.Array]) -> list[int]:
    """Return the places of arrays that differ by more than two programs' roundings do."""
    pairs = enumerate(zip(left, map(np.asarray, right), strict=False))
    return [i for i, (a, b) in pairs if a.shape != b.shape or not _alike(a, b)]


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    # A batch of twice the size changes a factor by 2; a rounding changes an integer by 1.
    absolute = 0.0 if np.issubdtype(a.dtype, np.floating) else 1.0
    return np.allclose(a.astype(np.float64), b, rtol=1e-3, atol=absolute, equal_nan=True)
