"""A plan evaluated: the traced operations run again, with codes in the place of planned tensors.

Each operation is computed in floating point as the model wrote it, and beside it its integer form
(`forms`, `derive`), where it has one; a tensor of the plan is quantized from its form.
"""

import enum
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxqat.errors import QuantizationError
from jaxqat.quant._forms import derive, forms
from jaxqat.quant._numerics import activations, grids, multiply, pairs, ranges
from jaxqat.quant._numerics import estimators as estimate
from jaxqat.quant._numerics.weights import look_up_weights
from jaxqat.quant._plan.plan import PARAMETERS, Layer, Lookup, Pair, Plan, Site
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant._trace.program import Atom, Constant, Node
from jaxqat.quant.recipe import Recipe


class Mode(enum.Enum):
    """What happens to activation ranges: observed in float, moved while training, or frozen."""

    CALIBRATE = enum.auto()
    TRAIN = enum.auto()
    FROZEN = enum.auto()


# Whether each layer is quantized, by its path: booleans, known only when the program runs.
Switches = Mapping[str, Any]


class Evaluated(NamedTuple):
    """A layer of the plan after evaluation.

    Attributes:
        layer: Which.
        weights: Its float weights, if it has any.
        step: Their learned step sizes, if they have any.
        result: Its result, real values.
    """

    layer: Layer | Lookup | Pair
    weights: Any
    step: Any
    result: Any


class Evaluator:
    """Evaluates one plan.

    With `switches`, one compiled program stands for every choice of layers. A layer that is off
    multiplies in float. A tensor is quantized if one of the layers that read it is on, and a sum or
    pooling behind it with it; then all its readers see that. All this is as with a recipe's rule
    that leaves the other layers in float, but that a tensor which is not quantized is not rounded
    as a term of a sum either.

    Attributes:
        new_ranges: All ranges after evaluation; those that it did not meet are as they were.
        codes: Codes and grid of each quantized tensor, by key, after evaluation.
        made_from: The form that each of them was quantized from.
        observed: The float tensors in their places, after calibration.
        products: What came of each planned product or look-up, by row of the plan's table; of a
            loop, in its last turn.
        outputs: The results with their forms.
        results: The results.
    """

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        state: Mapping[Key, ranges.Range],
        mode: Mode,
        switches: Switches | None = None,
    ):
        self.plan, self.recipe, self.state, self.mode = plan, recipe, state, mode
        self.switches = switches
        self.new_ranges: dict[Key, ranges.Range] = dict(state)
        self.codes: dict[Key, forms.Codes] = {}
        self.made_from: dict[Key, forms.Form] = {}
        self.observed: dict[Key, jax.Array] = {}
        self.products: dict[int, Evaluated] = {}
        self.outputs: list[derive.Operand] = []
        self.results: list[Any] = []
        self._known: dict[int, derive.Operand] = {}
        self._seen: dict[Key, tuple[Any, ...]] = {}

    def run(self, arguments: list[Any]) -> list[Any]:
        """The results of the program."""
        program = self.plan.program
        for number, value in (
            *zip(program.inputs, arguments, strict=True),
            *program.constants.items(),
        ):
            self._write(number, value, None, None)
        for node in program.nodes:
            layer = self.plan.layers.get(node)
            if layer is not None:
                self._see_weights(layer)
            if layer is not None and self.mode is not Mode.CALIBRATE:
                with jax.named_scope(layer.path):  # Kernels carry the layer's name.
                    values, form, blame = self._quantized(node, layer)
                self._write(node.outputs[0], values, form, blame, self._switch(layer.path))
                self._keep(layer, values)
                continue
            operands = [self._read(a) for a in node.inputs]
            results = node.bind(*(o.values for o in operands))
            form = derive.form_of(node, operands, results) if len(results) == 1 else None
            blame = None if form is not None else self._blame(node, operands)
            holds = True
            if form is not None:
                holds = derive.any_of(o.holds for o in operands if o.form is not None)
            for number, values in zip(node.outputs, results, strict=True):
                self._write(number, self._fenced(node, number, values), form, blame, holds)
            if layer is not None:
                self._keep(layer, results[0])
        self.outputs = [self._read(a) for a in program.outputs]
        self.results = [self._result(output) for output in self.outputs]
        return self.results

    def _result(self, output: derive.Operand) -> Any:
        """An output of the network; with frozen ranges, the integer network's number."""
        if self.mode is not Mode.FROZEN or not isinstance(output.form, forms.Accumulator):
            return output.values
        assert output.values is not None
        real = output.form.real()
        if output.holds is not True:
            real = jnp.where(output.holds, real, output.values)
        return activations.in_place_of(output.values, jax.lax.stop_gradient(real))

    def _fenced(self, node: Node, number: int, values: Any) -> Any:
        """Products of parameters, kept from being contracted (`forms.uncontracted`)."""
        frozen = self.mode is Mode.FROZEN and self.plan.level[number] == PARAMETERS
        if frozen and node.name == "mul" and values.dtype == jnp.float32:
            return forms.uncontracted(values)
        return values

    def _blame(self, node: Node, operands: list[derive.Operand]) -> str | None:
        before = next((o.blame for o in operands if o.blame is not None), None)
        return before or (node.where if not all(o.constant for o in operands) else None)

    def _read(self, atom: Atom) -> derive.Operand:
        if isinstance(atom, Constant):
            return derive.Operand(atom.value, None, True)
        return self._known[atom]

    def _write(
        self,
        number: int,
        values: Any,
        form: forms.Form | None,
        blame: str | None,
        holds: Any = True,
    ) -> None:
        site = self.plan.sites.get(number)
        constant = self.plan.level[number] == PARAMETERS
        if site is not None:
            real, holds_before, holds = values, holds, self._switch_of(site)
            before = derive.Operand(values, form, constant, blame, holds_before).any_form
            values, form = self._quantize(site, values, before or forms.Real(values, blame))
            if holds is not True:
                values = jnp.where(holds, values, real)
        blame = blame if not form else None
        self._known[number] = derive.Operand(values, form, constant, blame, holds)

    def _switch(self, path: str) -> Any:
        return True if self.switches is None else self.switches[path]

    def _switch_of(self, site: Site) -> Any:
        """Whether a layer is on that reads the tensor, or the tensor that it stands behind."""
        if self.switches is None:
            return True
        rows = [row for row in self.plan.table if row.range_key is not None]
        readers = [r for r in rows if r.range_key == site.key]
        readers = readers or [r for r in rows if r.range_key and r.range_key[:-1] == site.key[:-1]]
        return derive.any_of(self.switches[row.path] for row in readers)

    def _quantize(self, site: Site, values: Any, form: forms.Form):
        state = self._state(site.key)
        low, high = state["min"], state["max"]
        seen = None
        if self.mode is not Mode.FROZEN:
            seen = self._observe(site, state, values)
            if self.mode is Mode.CALIBRATE:
                self.observed[site.key] = values
                return values, None
            # Ranges are used one step late, so that one pass over the tensor both quantizes and
            # observes it; before the first observation there is only the batch itself.
            low, high = (
                jnp.where(state["count"] > 0, old, new)
                for old, new in zip((low, high), seen[:2], strict=True)
            )
        value = state[site.leaf] if site.leaf else None
        if seen is not None and site.leaf:
            value = _first(state, value, seen[2])
        grid = site.grid(low, high, value)
        self.made_from[site.key] = form
        values, codes = activations.quantize(
            values, form.steps(_constant(grid)), grid, learned=site.learned
        )
        self.codes[site.key] = forms.Codes(codes, _constant(grid), site.key)
        return values, self.codes[site.key]

    def _observe(self, site: Site, state: ranges.Range, values: Any) -> tuple[Any, ...]:
        """Takes a tensor into its range; returns what this batch alone would make of it.

        A tensor of several turns of a loop has the widest range of them.
        """
        low, high = estimate.activation_extent(values, site.settings)
        before = self._seen.get(site.key)
        if before is not None:
            low, high = jnp.minimum(low, before[0]), jnp.maximum(high, before[1])
        grid = site.grid(low, high)
        start: Any = None
        if site.learned == "pact":
            start = grid.scale * grid.top
        elif site.learned == "lsq":
            magnitude = jnp.mean(jnp.abs(jax.lax.stop_gradient(values).astype(jnp.float32)))
            start = estimate.first_step(magnitude, grid.top) if before is None else before[2]
        self._seen[site.key] = (low, high, start)
        decay = None if site.settings.act_range == "minmax" else self.recipe.range_decay
        new = ranges.observe(state, low, high, decay)
        self.new_ranges[site.key] = self._held(site.leaf, state, new, start) if site.leaf else new
        return low, high, start

    def _held(self, leaf: str, state: ranges.Range, new: ranges.Range, start: Any) -> ranges.Range:
        """The new state where a scale is learned: calibration averages what learning starts from.

        In training neither it nor the range, which has the zero point, moves any more.
        """
        if self.mode is Mode.CALIBRATE:
            return {**new, leaf: ranges.averaged(state, leaf, start)}
        new = {name: _first(state, state[name], x) for name, x in {**new, leaf: start}.items()}
        return {**new, "count": state["count"] + 1}

    def _state(self, key: Key) -> ranges.Range:
        try:
            return self.state[key]
        except KeyError:
            raise QuantizationError(
                f"The ranges hold nothing for {'/'.join(key)!r}; they hold "
                f"{', '.join('/'.join(k) for k in self.state) or 'nothing'}. Make them with "
                "`init_ranges` for this model, this recipe and these inputs."
            ) from None

    def _see_weights(self, layer: Layer | Lookup | Pair) -> None:
        """The step sizes that learning starts from, where there are none yet."""
        if isinstance(layer, Pair) or layer.step_key is None or self.mode is Mode.FROZEN:
            return
        state = self._state(layer.step_key)
        step = _first(state, state["step"], self._first_step(layer))
        self.new_ranges[layer.step_key] = {"step": step, "count": state["count"] + 1}

    def _first_step(self, layer: Layer | Lookup) -> Any:
        weights: Any = jax.lax.stop_gradient(self._read(layer.weights).values)
        magnitude = jnp.mean(
            jnp.abs(weights.astype(jnp.float32)), axis=layer.how.axes, keepdims=True
        )
        return estimate.first_step(magnitude, 2 ** (layer.how.bits - 1) - 1)

    def _step(self, layer: Layer | Lookup) -> Any:
        """The learned step sizes of a layer's weights; None if they are not learned."""
        if layer.step_key is None:
            return None
        state = self._state(layer.step_key)
        return grids.positive(_first(state, state["step"], self._first_step(layer)))

    def _keep(self, layer: Layer | Lookup | Pair, result: Any) -> None:
        if isinstance(layer, Pair):
            self.products[layer.row] = Evaluated(layer, None, None, result)
        else:
            weights = self._read(layer.weights).values
            self.products[layer.row] = Evaluated(layer, weights, self._step(layer), result)

    def _quantized(self, node: Node, layer: Layer | Lookup | Pair) -> tuple[Any, Any, str | None]:
        """A layer's result, its form, and why it has none."""
        if isinstance(layer, Pair):
            operands: list[Any] = [self._read(layer.left), self._read(layer.right)]
            both = [pairs.Quantized(o.values, o.form.codes, o.form.grid) for o in operands]
            values = self._either(
                node, layer, lambda: pairs.multiply(layer.dot, layer.dtype, *both)
            )
            return values, None, f"a product of two activations ({layer.path})"
        if isinstance(layer, Lookup):
            weights, rest = self._read(layer.weights).values, node.inputs[1:]

            def look_up() -> Any:
                table = look_up_weights(layer.how, weights, self._step(layer))
                return node.bind(table, *(self._read(a).values for a in rest))[0]

            return self._either(node, layer, look_up), None, f"a look-up in {layer.path}"
        if layer.dynamic:
            values = self._either(node, layer, lambda: self._multiply_dynamic(layer))
            return values, None, f"the dynamic range of the input of {layer.path}"
        values, form = self._multiply(node, layer)
        if layer.how.grouped:
            return values, None, f"a sum of groups with scales of their own ({layer.path})"
        return values, form, None

    def _multiply_dynamic(self, layer: Layer) -> Any:
        x, weights = self._read(layer.data).values, self._read(layer.weights).values
        assert x is not None and weights is not None
        axes, bits = layer.how.product.data_axes, layer.how.settings.act_bits or 8
        grid = grids.dynamic_grid(x, axes, bits)
        values, codes = activations.quantize(x, activations.in_steps(x, grid), grid)
        return multiply.multiply(layer.how, values, codes, grid, weights, self._step(layer)).real

    def _multiply(self, node: Node, layer: Layer) -> tuple[Any, forms.Form]:
        data, weights = self._read(layer.data), self._read(layer.weights)
        form = data.form
        assert isinstance(form, forms.Codes)  # The plan quantizes what a layer reads.
        assert data.values is not None and weights.values is not None
        noise = self._noise(layer, weights.values.shape)
        operands = (data.values, form.codes, form.grid, weights.values, self._step(layer), noise)
        result = self._either(node, layer, lambda: multiply.multiply(layer.how, *operands))
        total, correction, weight_scale, weight_codes = jax.lax.stop_gradient(result[1:])
        how = layer.how
        source = forms.Multiplied(layer.path, how.product, form, weight_codes, how.bits)
        accumulator = forms.Accumulator(
            total, correction, form.grid.scale, weight_scale, jnp.float32(0), source
        )
        return result.real, accumulator

    def _noise(self, layer: Layer, shape: tuple[int, ...]) -> Any:
        """What stochastic rounding adds to the weights of a layer in this step; None if nothing."""
        if self.mode is not Mode.TRAIN or layer.how.settings.rounding == "nearest":
            return None
        key = self.plan.table[layer.row].range_key
        assert key is not None  # Dynamic ranges are refused.
        seed = jax.random.fold_in(jax.random.key(0), zlib.crc32(layer.path.encode()))
        key = jax.random.fold_in(seed, self._state(key)["count"])
        return jax.random.uniform(key, shape, jnp.float32, -0.5, 0.5)

    def _either(
        self, node: Node, layer: Layer | Lookup | Pair, quantized: Callable[[], Any]
    ) -> Any:
        """A layer's quantized result; of a layer that is off, the float one in its place."""
        on = self._switch(layer.path)
        if on is True:
            return quantized()

        def real() -> Any:
            value = node.bind(*(self._read(a).values for a in node.inputs))[0]
            like = jax.eval_shape(quantized)
            if not isinstance(like, multiply.ProductResult):
                return value
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            return nothing._replace(real=value)

        return jax.lax.cond(on, quantized, real)


def _first(state: ranges.Range, old: Any, new: Any) -> Any:
    """What was kept, or, if nothing was seen yet, what is new."""
    return jnp.where(state["count"] > 0, old, new)


def _constant(grid: grids.Grid) -> grids.Grid:
    """The grid without the gradient of a learned scale, which flows through `quantize`."""
    return jax.tree.map(jax.lax.stop_gradient, grid)
