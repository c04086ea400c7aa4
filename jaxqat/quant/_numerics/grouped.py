"""Dense layers whose weights have a scale for each group of inputs.

The sum over the inputs is split: integers are summed within a group, and the groups' sums are
scaled and added as real numbers,

    y = s_x sum_g s_g (sum_{i in g} q_i k_i - z sum_{i in g} k_i),

(the group-wise quantization of Shen et al. 2019, arXiv:1909.05840).
"""

import dataclasses
from typing import Any

from jaxtyping import Array

from jaxqat.quant._numerics.products import Dot


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GroupedDot(Dot):
    """A dot over one axis, as a batch of dots, one for each group; the first axis of its results.

    Attributes:
        group_size: Inputs in a group; divides their number.
    """

    group_size: int

    @property
    def scale_axes(self) -> tuple[int, ...]:
        """Axes of the split weights that share one scale."""
        return (self.channel_axes[0] + 1,)

    def split_weights(self, weights: Array) -> Array:
        """The weights with their summed axis as two: groups, and inputs within one."""
        return self._split(weights, self.channel_axes[0])

    def over_output(self, values: Array) -> Array:
        """Values of the split weights' rank, as they spread over the sums of all groups."""
        return self._inner.over_output(values)

    def data_over_output(self, values: Array) -> Array:
        shape = list(values.shape)
        shape.insert(self.data_axes[0], 1)
        return self._inner.data_over_output(values.reshape(shape))

    def zero_sums(self, shape, weights):
        return self._inner.zero_sums(shape, self.split_weights(weights))

    def accumulate(self, codes, weights):
        codes = self._split(codes, self.data_axes[0])
        return self._inner.accumulate(codes, self.split_weights(weights))

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
