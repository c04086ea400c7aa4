# pyright: strict
"""Mapped axes: each device sees a part of the batch, and all must get the range of the whole."""

import jax

from jaxqat.errors import QuantizationError
from jaxqat.quant.recipe import Recipe


def observed_axes(recipe: Recipe) -> tuple[str, ...]:
    """Return the mapped axes to reduce ranges over.

    Raises:
        QuantizationError: The recipe names an axis that is not mapped here, or the model is called
            in a `shard_map` or `pmap` over an axis that the recipe does not name.
    """
    axes = recipe.range_axes
    unbound = [axis for axis in axes if not _is_bound(axis)]
    if unbound:
        raise QuantizationError(
            f"quant.range_axis names {unbound[0]!r}, which is no mapped axis here: observe ranges "
            "inside the `jax.shard_map` or `jax.pmap` over it, or on one device with "
            "`dataclasses.replace(recipe, range_axis=None)`; the variables are the same."
        )
    manual = jax.sharding.get_abstract_mesh().manual_axes
    missing = [axis for axis in manual if axis not in axes]
    if missing:
        names = ", ".join(map(repr, missing))
        raise QuantizationError(
            f"Ranges are observed inside a mapped axis that quant.range_axis does not name "
            f"({names}), so every device would get the range of its own part of the batch. Set "
            "`range_axis` in the recipe to all mapped axes (and give `jax.pmap` an `axis_name`); "
            "an axis over which the batch is not split changes nothing."
        )
    return axes


def _is_bound(axis: str) -> bool:
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True
