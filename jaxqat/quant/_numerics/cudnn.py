"""How cuDNN's s8 convolutions give exact sums: the one rule for training and for execution.

cuDNN's s8 convolutions return float32, not s32, which is exact for sums below 2**24. Grouped ones
have given wrong sums (openxla/xla issue 49123). So

- a depthwise convolution is a sum of shifted tensors (`windows.depthwise`);
- any other convolution is one convolution for each group; where its sums could reach 2**24, it is
  split further by input channels, and the parts are added as int32;
- where no split is fine enough, it is a dot over gathered windows (`windows.dot_over_windows`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int8

EXACT_FLOAT = 2**24
CHANNELS = 4  # cuDNN needs multiples of 4 channels.


class Part(NamedTuple):
    """A part of a convolution whose sums are exact.

    Attributes:
        outputs: Its output channels.
        inputs: Its input channels.
        in_group: The same input channels, counted within their group: the weights' input axis.
    """

    outputs: slice
    inputs: slice
    in_group: slice


def exact_parts(bounds: np.ndarray, groups: int) -> list[Part] | None:
    """Return the parts into which a convolution is split, so that float32 holds every sum exactly.

    Args:
        bounds: (inputs of a group, outputs), the largest magnitude that an input channel can add to
            a sum, over all codes.
        groups: Channel groups of the convolution.

    Returns:
        The parts in the order of their outputs; None if no split is fine enough.
    """
    inputs, outputs = bounds.shape[0], bounds.shape[1] // groups
    parts: list[Part] = []
    for group in range(groups):
        made = slice(group * outputs, (group + 1) * outputs)
        ranges = _exact_ranges(bounds[:, made])
        if ranges is None:
            return None
        parts += [
            Part(made, slice(group * inputs + start, group * inputs + stop), slice(start, stop))
            for start, stop in ranges
        ]
    return parts


def _exact_ranges(bounds: np.ndarray) -> list[tuple[int, int]] | None:
    ranges: list[tuple[int, int]] = []
    start = 0
    for channel in range(CHANNELS, len(bounds), CHANNELS):
        if bounds[start : channel + CHANNELS].sum(0).max() >= EXACT_FLOAT:
            ranges.append((start, channel))
            start = channel
    ranges.append((start, len(bounds)))
    return ranges if all(bounds[a:b].sum(0).max() < EXACT_FLOAT for a, b in ranges) else None


def convolve(
    parts: Sequence[tuple[Part, Int8[Array, "..."]]],
    codes: Int8[Array, "..."],
    product: Callable[[Array, Array], Array],
    axes: tuple[int, int],
) -> Int[Array, "..."]:
    """Return the int32 sums of a convolution that is split into exact parts.

    Args:
        parts: From `exact_parts`, each with its weights.
        codes: Of the activations.
        product: The convolution without groups, s8 x s8 -> s32.
        axes: The axes of channels in the codes and in the result.
    """
    sums: dict[int, Any] = {}
    for part, weights in parts:
        taken = codes
        if len(parts) > 1:
            taken = lax.slice_in_dim(codes, part.inputs.start, part.inputs.stop, axis=axes[0])
            # After the barrier XLA sees plain s8 tensors, which cuDNN needs.
            taken, weights = lax.optimization_barrier((taken, weights))
        # cuDNN has no s32 output, so convert to float32 at once. The clipping changes no value, but
        # keeps XLA from simplifying the two conversions away.
        real = product(taken, weights).astype(jnp.float32)
        total = jnp.clip(real, -EXACT_FLOAT, EXACT_FLOAT).astype(jnp.int32)
        sums[part.outputs.start] = sums.get(part.outputs.start, 0) + total
    return jnp.concatenate(list(sums.values()), axes[1])
