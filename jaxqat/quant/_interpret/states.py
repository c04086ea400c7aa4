# pyright: strict
"""Ranges and learned step sizes during an evaluation: which are used, and what becomes of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxqat.errors import QuantizationError
from jaxqat.quant._interpret.mapped import observed_axes
from jaxqat.quant._interpret.modes import Mode
from jaxqat.quant._numerics import cpu, grids, ranges
from jaxqat.quant._numerics import estimators as estimate
from jaxqat.quant._plan.plan import Layer, Lookup, Plan, QuantizedTensor
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant.recipe import Recipe


class _Observed(NamedTuple):
    """What one batch says about a tensor: its range, and the first value of a learned scale."""

    low: Any
    high: Any
    start: Any


class States:
    """The ranges before an evaluation, and after it.

    Attributes:
        before: All ranges and learned step sizes, by key.
        after: The same after the evaluation; those that it did not meet are unchanged.
    """

    def __init__(self, plan: Plan, state: Mapping[Key, ranges.Range], mode: Mode, recipe: Recipe):
        self.before, self._mode, self._recipe = state, mode, recipe
        self._tensors = plan.by_key()
        self.after: dict[Key, ranges.Range] = dict(state)
        self._observed: dict[Key, _Observed] = {}

    def snapshot(self) -> tuple[dict[Key, ranges.Range], dict[Key, _Observed]]:
        """Return what is known so far, for `since`."""
        return dict(self.after), dict(self._observed)

    def since(self, snapshot: Any) -> Any:
        """Return what has changed since a snapshot, for `update`."""
        return tuple(
            {key: value for key, value in now.items() if value is not before.get(key)}
            for now, before in zip((self.after, self._observed), snapshot, strict=True)
        )

    def update(self, changes: Any) -> None:
        """Take over what `since` returned."""
        after, observed = changes
        self.after.update(after)
        self._observed.update(observed)

    def of(self, key: Key) -> ranges.Range:
        """Return the state of a tensor or of weights before the evaluation.

        Raises:
            QuantizationError: There is none.
        """
        try:
            return self.before[key]
        except KeyError:
            raise QuantizationError(
                f"No range for {'/'.join(key)!r} (ranges found: "
                f"{', '.join('/'.join(k) for k in self.before) or 'none'}). Call `calibrate` with "
                "this model, recipe and inputs."
            ) from None

    def grid(self, tensor: QuantizedTensor, values: Any) -> grids.Grid | None:
        """Observe a tensor, unless ranges are frozen; return its grid, None while calibrating.

        Ranges are used one step late, so that one pass over the tensor both quantizes and observes
        it. Before the first observation there is only the batch itself.
        """
        state = self.of(tensor.key)
        low, high = state["min"], state["max"]
        learned = state[tensor.leaf] if tensor.leaf else None
        if self._mode is not Mode.FROZEN:
            seen = self._observe(tensor, state, values)
            if self._mode is Mode.CALIBRATE:
                return None
            low, high = _old_or(state, low, seen.low), _old_or(state, high, seen.high)
            if tensor.leaf:
                learned = _old_or(state, learned, seen.start)
        grid = tensor.grid(*self._useful(tensor, low, high), learned)
        return cpu.store(grid if tensor.factor == 1.0 else grids.stretched(grid, tensor.factor))

    def _useful(self, tensor: QuantizedTensor, low: Any, high: Any) -> tuple[Any, Any]:
        """Return the range of a term of a sum, cut to what can change the sum's code.

        The codes of a sum cover [sum_low, sum_high], those of the other term [other_low,
        other_high]. A term below sum_low - other_high gives the smallest code of the sum whatever
        the other term is, so its grid need not reach further; likewise above. The negative values
        that a ReLU discards would otherwise coarsen it.
        """
        if tensor.other_term is None:
            return low, high
        (reader,) = tensor.readers  # The sum alone.
        total, other = self.of(reader), self.of(tensor.other_term)
        sum_low, sum_high = self._tensors[reader].extent(total)
        other_low, other_high = self._tensors[tensor.other_term].extent(other)
        # A symmetric grid goes as far below zero as above, also behind a ReLU.
        sum_low = jnp.where(total["min"] >= 0, jnp.maximum(sum_low, 0.0), sum_low)
        sum_high = jnp.where(total["max"] <= 0, jnp.minimum(sum_high, 0.0), sum_high)
        known = (total["count"] > 0) & (other["count"] > 0)
        # All zeros on every batch, as behind a batch norm whose gamma starts at 0.
        empty = (low == 0) & (high == 0)
        cut_low = jnp.where(empty, sum_low, jnp.maximum(low, sum_low - other_high))
        cut_high = jnp.where(empty, sum_high, jnp.minimum(high, sum_high - other_low))
        return jnp.where(known, cut_low, low), jnp.where(known, cut_high, high)

    def _observe(self, tensor: QuantizedTensor, state: ranges.Range, values: Any) -> _Observed:
        """Move the range of a tensor; return the range that this batch alone would give.

        A tensor with several iterations of a loop gets the widest range of them, and a tensor on
        several devices that of the whole batch.
        """
        axes = observed_axes(self._recipe)
        low, high = estimate.activation_extent(values, tensor.settings, axes)
        if tensor.factor != 1.0:
            low, high = low / tensor.factor, high / tensor.factor
        before = self._observed.get(tensor.key)
        if before is not None:
            low, high = jnp.minimum(low, before.low), jnp.maximum(high, before.high)
        grid = tensor.grid(low, high)
        start: Any = None
        if tensor.learned == "pact":
            start = grid.scale * grid.top
        elif tensor.learned == "lsq":  # Dropout keeps the mean.
            magnitude = estimate.mean_magnitude(values, axes)
            start = (
                estimate.first_step_size(magnitude, grid.top) if before is None else before.start
            )
        seen = self._observed[tensor.key] = _Observed(low, high, start)
        decay = None if tensor.settings.act_range == "minmax" else self._recipe.range_decay
        new = ranges.observe(state, low, high, decay)
        leaf = tensor.leaf
        self.after[tensor.key] = self._with_learned(leaf, state, new, start) if leaf else new
        return seen

    def _with_learned(
        self, leaf: str, state: ranges.Range, new: ranges.Range, start: Any
    ) -> ranges.Range:
        """Return the new state of a learned scale: calibration averages its first value.

        In training the optimizer moves it, and the range, which has the zero point, stays.
        """
        if self._mode is Mode.CALIBRATE:
            return {**new, leaf: ranges.averaged(state, leaf, start)}
        new = {name: _old_or(state, state[name], x) for name, x in {**new, leaf: start}.items()}
        return {**new, "count": state["count"] + 1}

    def observe_weights(self, layer: Layer | Lookup, weights: Any) -> None:
        """Set the first value of a layer's learned step sizes, unless ranges are frozen."""
        if layer.step_size_key is None or self._mode is Mode.FROZEN:
            return
        state = self.of(layer.step_size_key)
        step_size = _old_or(state, state["step"], _first_step_size(layer, weights))
        self.after[layer.step_size_key] = {"step": step_size, "count": state["count"] + 1}

    def step_size(self, layer: Layer | Lookup, weights: Any) -> Any:
        """Return the learned step sizes of a layer's weights; None if they are not learned."""
        if layer.step_size_key is None:
            return None
        state = self.of(layer.step_size_key)
        return grids.positive(_old_or(state, state["step"], _first_step_size(layer, weights)))


def _first_step_size(layer: Layer | Lookup, weights: Any) -> Any:
    weights = jax.lax.stop_gradient(weights)
    quantizer = layer.quantizer
    magnitude = jnp.mean(jnp.abs(weights.astype(jnp.float32)), axis=quantizer.axes, keepdims=True)
    return estimate.first_step_size(magnitude, 2 ** (quantizer.bits - 1) - 1)


def _old_or(state: ranges.Range, old: Any, new: Any) -> Any:
    """Return the old value, or the new one if the state has seen no batch yet."""
    return jnp.where(state["count"] > 0, old, new)
