"""Dense layers whose weights have one scale per group of inputs.

Integers are summed within each group; the sums are scaled and added as real numbers,

    y = s_x sum_g s_g (sum_{i in g} q_i k_i - z sum_{i in g} k_i),

(the group-wise quantization of Shen et al. 2019, arXiv:1909.05840).
"""

import dataclasses
from typing import Any

from jaxtyping import Array

from jaxqat.quant._numerics.products import LARGEST, Dot


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GroupedDot(Dot):
    """A dot over one axis as a batch of dots, one per group; groups are the results' first axis.

    Attributes:
        group_size: Inputs in a group; divides the number of inputs.
    """

    group_size: int

    @property
    def scale_axes(self) -> tuple[int, ...]:
        """Axes of the split weights that share one scale."""
        return (self.channel_axes[0] + 1,)

    def split_weights(self, weights: Array) -> Array:
        """Return the weights with the summed axis split into groups and inputs in a group."""
        return self._split(weights, self.channel_axes[0])

    def over_output(self, values: Array) -> Array:
        """Return values of the split weights' rank as they broadcast over all groups' sums."""
        return self._inner.over_output(values)

    def data_over_output(self, values: Array) -> Array:
        shape = list(values.shape)
        shape.insert(self.data_axes[0], 1)
        return self._inner.data_over_output(values.reshape(shape))

    def zero_sums(self, shape, weights):
        return self._inner.zero_sums(shape, self.split_weights(weights))

    def accumulate(self, codes, weights, largest=LARGEST):
        codes = self._split(codes, self.data_axes[0])
        return self._inner.accumulate(codes, self.split_weights(weights), largest)

    def inject(self, codes, weights, largest=LARGEST):
        return self._inner.inject(self._split(codes, self.data_axes[0]), weights, largest)

    def _split(self, x: Array, axis: int) -> Array:
        groups = x.shape[axis] // self.group_size
        return x.reshape(*x.shape[:axis], groups, self.group_size, *x.shape[axis + 1 :])

    @property
    def _inner(self) -> Dot:
        summed, batch = self.params["dimension_numbers"]
        axes = [
            (s[0], tuple(a + (a > s[0]) for a in b)) for s, b in zip(summed, batch, strict=True)
        ]
        params: dict[str, Any] = {
            **self.params,
            "dimension_numbers": (
                tuple((axis + 1,) for axis, _ in axes),
                tuple((axis, *rest) for axis, rest in axes),
            ),
        }
        return Dot(self.primitive, params, self.output_rank + 1, self.weight_side)
