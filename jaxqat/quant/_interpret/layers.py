# pyright: strict, reportUnknownMemberType=false
"""Results of the plan's layers: products of codes, look-ups, and products of two activations."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxqat.quant import _forms as forms
from jaxqat.quant._interpret.modes import LayerSwitches, Mode
from jaxqat.quant._interpret.states import States
from jaxqat.quant._numerics import activations, grids, multiply, pairs
from jaxqat.quant._numerics.weights import dequantized_weights
from jaxqat.quant._plan.plan import Layer, Lookup, Pair, Plan
from jaxqat.quant._trace.program import Atom, TracedNode


class EvaluatedLayer(NamedTuple):
    """A layer of the plan after evaluation.

    Attributes:
        layer: The layer.
        weights: Its float weights, if it has any.
        step_size: Their learned step sizes, if they have any.
        result: Its result, real values.
    """

    layer: Layer | Lookup | Pair
    weights: Any
    step_size: Any
    result: Any


class LayerOutput(NamedTuple):
    """Result of a layer: real values, and their form or the reason why there is none."""

    values: Any
    form: forms.Form | None = None
    float_reason: str | None = None


class LayerEvaluator:
    """Computes the results of layers.

    Args:
        plan: The plan.
        states: Ranges and learned step sizes.
        mode: What happens to ranges.
        switches: Which layers are on.
        read: Returns the value of an atom, and its form.
    """

    def __init__(
        self,
        plan: Plan,
        states: States,
        mode: Mode,
        switches: LayerSwitches,
        read: Callable[[Atom], forms.Operand],
    ):
        self._table, self._states, self._mode = plan.table, states, mode
        self._switches, self._read = switches, read

    def result(self, node: TracedNode, layer: Layer | Lookup | Pair) -> LayerOutput:
        """Return the quantized result of a layer."""
        if isinstance(layer, Pair):
            values, total = self._switched(node, layer, lambda: self._multiply_pair(layer))
            form = self._paired(layer, total)
            return LayerOutput(values, form, f"the length of the sums of {layer.path}")
        if isinstance(layer, Lookup):
            values = self._switched(node, layer, lambda: self._look_up(node, layer))
            return LayerOutput(values, None, f"a look-up in {layer.path}")
        if layer.dynamic:
            values = self._switched(node, layer, lambda: self._multiply_dynamic(layer))
            return LayerOutput(values, None, f"the dynamic range of the input of {layer.path}")
        values, form = self._multiply(node, layer)
        if layer.quantizer.grouped:
            reason = f"a sum of groups with scales of their own ({layer.path})"
            return LayerOutput(values, None, reason)
        return LayerOutput(values, form)

    def in_float(self, node: TracedNode, layer: Layer | Lookup | Pair) -> list[forms.Operand]:
        """Return what the operation of a layer reads, with dequantized weights, as if in float."""
        operands = [self._read(a) for a in node.inputs]
        if isinstance(layer, Pair):
            return operands
        weights: Any = self._read(layer.weights).values
        step_size = self._states.step_size(layer, weights)
        values: Any = dequantized_weights(layer.quantizer, weights, step_size)
        side = 0 if isinstance(layer, Lookup) else 1 - node.inputs.index(layer.data)
        operands[side] = forms.Operand(values, None, True)
        if isinstance(layer, Layer) and layer.dynamic:
            operands[1 - side] = self._rounded(node, layer, operands[1 - side])
        return operands

    def _rounded(self, node: TracedNode, layer: Layer, data: forms.Operand) -> forms.Operand:
        """Return what a layer of a dynamic range reads, dequantized."""
        quantizer = layer.quantizer
        axes, bits = quantizer.product.data_axes, quantizer.settings.act_bits or 8

        def rounded(x: Any) -> Any:
            grid = grids.dynamic_grid(x, axes, bits)
            units = jnp.round(x.astype(jnp.float32) * grid.inverse)
            return (jnp.clip(units, grid.low, grid.high) * grid.scale).astype(x.dtype)

        (equation,) = jax.make_jaxpr(jax.jit(rounded))(data.values).jaxpr.eqns
        call = TracedNode(equation, (), (), node.scope)
        made = forms.Made(call, 0, lambda: [data])
        return forms.Operand(rounded(data.values), None, data.constant, made=made)

    def evaluated(self, layer: Layer | Lookup | Pair, result: Any) -> EvaluatedLayer:
        """Return a layer with its weights and its result."""
        if isinstance(layer, Pair):
            return EvaluatedLayer(layer, None, None, result)
        weights = self._read(layer.weights).values
        return EvaluatedLayer(layer, weights, self._states.step_size(layer, weights), result)

    def _multiply_pair(self, layer: Pair) -> pairs.PairResult:
        operands: list[Any] = [self._read(layer.left), self._read(layer.right)]
        both = [pairs.Quantized(o.values, o.form.codes, o.form.grid) for o in operands]
        return pairs.multiply(layer.dot, layer.dtype, *both)

    def _paired(self, layer: Pair, total: Any) -> forms.Form | None:
        """Return the form of a product of two activations; None if a sum may overflow int32."""
        left, right = self._read(layer.left).form, self._read(layer.right).form
        assert isinstance(left, forms.Codes) and isinstance(right, forms.Codes)
        if pairs.terms(layer.dot, left.codes) > pairs.MOST_TERMS:
            return None
        return forms.Paired(layer.path, layer.dot, left, right, jax.lax.stop_gradient(total))

    def _look_up(self, node: TracedNode, layer: Lookup) -> Any:
        weights: Any = self._read(layer.weights).values
        step_size = self._states.step_size(layer, weights)
        table = dequantized_weights(layer.quantizer, weights, step_size)
        return node.bind(table, *(self._read(a).values for a in node.inputs[1:]))[0]

    def _multiply_dynamic(self, layer: Layer) -> Any:
        x, weights = self._read(layer.data).values, self._read(layer.weights).values
        assert x is not None and weights is not None
        quantizer = layer.quantizer
        axes, bits = quantizer.product.data_axes, quantizer.settings.act_bits or 8
        grid = grids.dynamic_grid(x, axes, bits)
        values, codes = activations.quantize(x, activations.in_units(x, grid), grid, real=True)
        step_size = self._states.step_size(layer, weights)
        return multiply.multiply(quantizer, values, codes, grid, weights, step_size).real

    def _multiply(self, node: TracedNode, layer: Layer) -> tuple[Any, forms.Form]:
        data, weights = self._read(layer.data), self._read(layer.weights)
        codes = data.form
        assert isinstance(codes, forms.Codes)  # The plan quantizes what a layer reads.
        assert data.values is not None and weights.values is not None
        step_size = self._states.step_size(layer, weights.values)
        noise = self._noise(layer, weights.values.shape)
        operands = (data.values, codes.codes, codes.grid, weights.values, step_size, noise)
        quantizer = layer.quantizer
        result = self._switched(node, layer, lambda: multiply.multiply(quantizer, *operands))
        total, correction, weight_scale, weight_codes = jax.lax.stop_gradient(result[1:])
        source = forms.Multiplied(
            layer.path, quantizer.product, codes, weight_codes, quantizer.bits
        )
        no_offset = jnp.float32(0)
        accumulator = forms.Accumulator(
            total, correction, codes.grid.scale, weight_scale, no_offset, source
        )
        return result.real, accumulator

    def _noise(self, layer: Layer, shape: tuple[int, ...]) -> Any:
        """Return the noise of stochastic rounding in this step; None without it."""
        if self._mode is not Mode.TRAIN or layer.quantizer.settings.rounding == "nearest":
            return None
        key = self._table[layer.index].range_key
        assert key is not None  # A recipe cannot have dynamic ranges with stochastic rounding.
        seed = jax.random.fold_in(jax.random.key(0), zlib.crc32(layer.path.encode()))
        key = jax.random.fold_in(seed, self._states.of(key)["count"])
        return jax.random.uniform(key, shape, jnp.float32, -0.5, 0.5)

    def _switched(
        self, node: TracedNode, layer: Layer | Lookup | Pair, quantized: Callable[[], Any]
    ) -> Any:
        """Return a layer's quantized result, or its float result if the layer is off."""
        on = self._switches.layer(layer.path)
        if on is True:
            return quantized()

        def real() -> Any:
            value = node.bind(*(self._read(a).values for a in node.inputs))[0]
            like = jax.eval_shape(quantized)
            if not isinstance(like, multiply.MultiplyResult | pairs.PairResult):
                return value
            nothing: multiply.MultiplyResult | pairs.PairResult = jax.tree.map(_zeros, like)
            return nothing._replace(real=value)

        return cast(Any, jax.lax.cond(on, quantized, real))


def _zeros(like: Any) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)
