"""The loop over a plan's operations."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxqat.quant import _forms as forms
from jaxqat.quant._forms.derive import form_of
from jaxqat.quant._forms.operand import any_of
from jaxqat.quant._forms.primitives import primitive_of
from jaxqat.quant._forms.rules import dropped_out
from jaxqat.quant._interpret.layers import EvaluatedLayer, LayerEvaluator
from jaxqat.quant._interpret.modes import LayerSwitches, Mode, Switches
from jaxqat.quant._interpret.states import States
from jaxqat.quant._numerics import activations, grids, ranges
from jaxqat.quant._numerics.promotion import default_promotion
from jaxqat.quant._plan.plan import PARAMETERS, Pair, Plan, QuantizedTensor
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant._trace.program import PRODUCTS, Atom, Constant, TracedNode
from jaxqat.quant.recipe import Recipe


class Evaluator:
    """Evaluates one plan.

    With `switches`, one compiled program serves every choice of layers. A layer that is off
    multiplies in float. A tensor is quantized if at least one layer that reads it is on, for all
    its readers; likewise a sum or a pool before it. The result is that of a recipe with a rule that
    leaves the other layers in float, with two exceptions: a tensor that is not quantized is not
    rounded as a term of a sum either, and it is a real number to what follows, whose codes can
    differ at ties.

    Attributes:
        plan: The plan.
        state: All ranges before the evaluation.
        new_ranges: All ranges after it; those that it did not meet are unchanged.
        codes: Codes and grid of each quantized tensor, by name: the key of its range, with the
            number of the iteration from a loop's second on, as 'cell/input[1]'.
        forms: The form that each of them was rounded from, by name.
        before: Each of them before it was quantized, by name.
        observed: The float tensors in their places, after calibration, by name.
        range_keys: Key of the range of each quantized tensor, by name.
        layers: Each planned layer with its result, by index in the plan's table; for a loop, of
            the last iteration.
        outputs: The results with their forms.
        results: The results.
        paths: Place of each in what the function returned (`jax.tree_util`), once it is known.
    """

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        state: Mapping[Key, ranges.Range],
        mode: Mode,
        switches: Switches | None = None,
    ):
        self.plan, self.state = plan, state
        self.codes: dict[Key, forms.Codes] = {}
        self.forms: dict[Key, forms.Form] = {}
        self.before: dict[Key, forms.Operand] = {}
        self.observed: dict[Key, jax.Array] = {}
        self.range_keys: dict[Key, Key] = {}
        self.layers: dict[int, EvaluatedLayer] = {}
        self.outputs: list[forms.Operand] = []
        self.results: list[Any] = []
        self.paths: list[tuple[Any, ...]] = []
        self._mode, self._switches = mode, LayerSwitches(plan, switches)
        self._states = States(plan, state, mode, recipe)
        self._known: dict[int, forms.Operand] = {}
        self._met: dict[Key, int] = {}
        self._layers = LayerEvaluator(plan, self._states, mode, self._switches, self._read)

    @property
    def new_ranges(self) -> dict[Key, ranges.Range]:
        """All ranges after the evaluation."""
        return self._states.after

    @property
    def nan_counts(self) -> dict[Key, jax.Array]:
        """How many values were NaN and got the code of zero, by name of the quantized tensor.

        Only real values can be NaN, as the model's input: tensors that are computed from codes
        are not listed.
        """
        parts = {key: list(forms.real_parts(form)) for key, form in self.forms.items()}
        return {
            key: sum((jnp.sum(jnp.isnan(part.values)) for part in real), start=jnp.int32(0))
            for key, real in parts.items()
            if real
        }

    @property
    def products(self) -> dict[str, forms.Accumulator]:
        """The sums of each layer's codes and weights, by its path; in loops, of the last one.

        Not of layers in float or of dynamic ranges, whose sums have no form.
        """
        found = {
            layer.path: self._known[node.outputs[0]].form
            for node, layer in self.plan.layers.items()
        }
        return {
            path: form
            for path, form in found.items()
            if isinstance(form, forms.Accumulator) and isinstance(form.source, forms.Multiplied)
        }

    @default_promotion
    def run(self, arguments: list[Any]) -> list[Any]:
        """Run the program; return its results."""
        program = self.plan.program
        for number, value in (
            *zip(program.inputs, arguments, strict=True),
            *program.constants.items(),
        ):
            self._write(number, value, self._given(number, value), None)
        self._run_nodes()
        self.outputs = [self._read(a) for a in program.outputs]
        self.results = [self._result(output) for output in self.outputs]
        return self.results

    def _given(self, number: int, value: Any) -> forms.Form | None:
        """Return the form of an input of the model, with frozen ranges.

        uint8 is codes. Real numbers are rounded first where they are only moved, joined or clipped
        before they are quantized, so that the network does that on codes.
        """
        is_data = self.plan.level[number] > PARAMETERS
        if self._mode is not Mode.FROZEN or not is_data or jnp.ndim(value) < 2:
            return None
        if value.dtype == jnp.uint8:
            return forms.Pixels.of(value)
        return forms.Real(value) if value.dtype == jnp.float32 else None

    def _run_nodes(self) -> None:
        for node in self.plan.program.nodes:
            self._run_node(node)

    def _run_node(self, node: TracedNode) -> None:
        if node in self.plan.layers:
            self._run_layer(node)
        else:
            self._run_operation(node)

    def _run_layer(self, node: TracedNode) -> None:
        layer = self.plan.layers[node]
        if not isinstance(layer, Pair):
            self._states.observe_weights(layer, self._read(layer.weights).values)
        if self._mode is Mode.CALIBRATE:
            values = self._run_operation(node)[0]
        else:
            with jax.named_scope(layer.path):  # Kernels have the layer's name.
                values, form, reason = self._layers.result(node, layer)
            switch = self._switches.layer(layer.path)
            made = forms.Made(node, 0, functools.partial(self._layers.in_float, node, layer))
            self._write(node.outputs[0], values, form, reason, switch, made)
        self.layers[layer.index] = self._layers.evaluated(layer, values)

    def _run_operation(self, node: TracedNode) -> list[Any]:
        """Run an operation in float, and derive the form of its result."""
        tensors = self.plan.tensors
        operands = [
            self._as_planned(self._read(a), tensors.get((node, i)))
            for i, a in enumerate(node.inputs)
        ]
        results = self._computed(node, [o.values for o in operands])
        form, holds = self._form(node, operands, results)
        reason = None if form is not None else self._float_reason(node, operands)
        for place, (number, values) in enumerate(zip(node.outputs, results, strict=True)):
            values = self._uncontracted(node, number, values)
            made = forms.Made(node, place, lambda: operands)
            self._write(number, values, form, reason, holds, made)
        return results

    def _computed(self, node: TracedNode, operands: list[Any]) -> list[Any]:
        """Return an operation's results; of parameters, those that every CPU has.

        A network converted from a checkpoint is then the same on each of them. Training, which
        follows its batch statistics anyway, does not need it.
        """
        exact = primitive_of(node.name).of_parameters
        if exact is None or not self._is_frozen_parameter(node.outputs[0], operands[0]):
            return node.bind(*operands)
        return [exact(operands[0])]

    def _form(
        self, node: TracedNode, operands: list[forms.Operand], results: list[Any]
    ) -> tuple[forms.Form | None, Any]:
        """Return the form of an operation's result, and whether it describes the result."""
        dropout = self.plan.dropouts.get(node)
        if dropout is not None:
            before = self._read(dropout.tensor)
            selection = _selection(node, dropout.place, [o.values for o in operands])
            return dropped_out(selection, before.form, dropout.factor), before.holds
        frozen = self._mode is Mode.FROZEN
        single = len(results) == 1
        form = form_of(node, operands, results[0], tables=frozen) if single else None
        if form is None:
            return None, True
        return form, any_of(o.holds for o in operands if o.form is not None)

    def _result(self, output: forms.Operand) -> Any:
        """Return an output of the model; with frozen ranges, the integer network's number."""
        if self._mode is not Mode.FROZEN or not isinstance(output.form, forms.Accumulator):
            return output.values
        assert output.values is not None
        real = output.form.real()
        if output.holds is not True:
            real = jnp.where(output.holds, real, output.values)
        return activations.in_place_of(output.values, jax.lax.stop_gradient(real))

    def _uncontracted(self, node: TracedNode, number: int, values: Any) -> Any:
        """Keep a product of parameters from being contracted (`forms.uncontracted`).

        Forms take their coefficients from such products. Training, which follows its batch
        statistics anyway, does not need it.
        """
        contracted = primitive_of(node.name).may_be_contracted
        if contracted and self._is_frozen_parameter(number, values):
            return forms.uncontracted(values)
        return values

    def _is_frozen_parameter(self, number: int, values: Any) -> bool:
        """Return whether an array depends on no data, in float32 and with frozen ranges."""
        frozen = self._mode is Mode.FROZEN and self.plan.level[number] <= PARAMETERS
        return frozen and jnp.result_type(values) == jnp.float32

    def _float_reason(self, node: TracedNode, operands: list[forms.Operand]) -> str | None:
        before = next((o.float_reason for o in operands if o.float_reason is not None), None)
        is_pair = node.name in PRODUCTS and not any(o.constant for o in operands)
        # As in attention, whose own parts, such as an added bias, are not what is in the way.
        if is_pair and (before is None or (node.module and f" {node.module}/" in before)):
            return f"a product of two activations ({node.module or node.name})"
        if before is not None or all(o.constant for o in operands):
            return before
        return self.plan.program.where(node)

    def _read(self, atom: Atom) -> forms.Operand:
        if isinstance(atom, Constant):
            return forms.Operand(atom.value, None, True)
        return self._known[atom]

    def _write(
        self,
        number: int,
        values: Any,
        form: forms.Form | None,
        float_reason: str | None,
        holds: Any = True,
        made: forms.Made | None = None,
    ) -> None:
        """Set a variable; quantize it if the plan says so."""
        constant = self.plan.level[number] <= PARAMETERS
        operand = forms.Operand(values, form, constant, float_reason, holds, made)
        self._known[number] = self._as_planned(operand, self.plan.tensors.get(number))

    def _as_planned(self, operand: forms.Operand, tensor: QuantizedTensor | None) -> forms.Operand:
        """Return an operand, quantized if the plan has a tensor for it."""
        real, form, holds = operand.values, operand.form, operand.holds
        values = real
        if tensor is not None and real is not None:
            values, form = self._quantize(tensor, real, operand)
            holds = self._switches.tensor(tensor)
            if holds is not True:
                values = jnp.where(holds, values, real)
        reason = operand.float_reason if not form else None
        return forms.Operand(values, form, operand.constant, reason, holds, operand.made)

    def _quantize(
        self, tensor: QuantizedTensor, values: Any, before: forms.Operand
    ) -> tuple[Any, forms.Form | None]:
        """Round a tensor to its grid; only observe it while calibrating."""
        name = self._name(tensor)
        grid = self._states.grid(tensor, values)
        if grid is None:
            self.observed[name] = values
            return values, None
        form = before.any_form
        assert form is not None
        self.forms[name], self.before[name] = form, before
        units = form.in_units(_constant(grid))
        real = any(True for _ in forms.real_parts(form))
        values, codes = activations.quantize(values, units, grid, learned=tensor.learned, real=real)
        self.codes[name] = forms.Codes(codes, _constant(grid), name)
        return values, self.codes[name]

    def _name(self, tensor: QuantizedTensor) -> Key:
        """Return the name of the next tensor with a range: iterations of a loop share one."""
        key = tensor.key
        iteration = self._met[key] = self._met.get(key, -1) + 1
        name = key if iteration == 0 else (*key[:-1], f"{key[-1]}[{iteration}]")
        self.range_keys[name] = key
        return name


def _selection(node: TracedNode, place: int, operands: list[Any]) -> forms.Operation:
    """Return what a dropout selects, as an operation on kept elements and zeros."""

    def bind(kept: Any, zeros: Any) -> Any:
        if len(operands) == 2:  # A product with a mask of zeros and factors.
            return jnp.where(operands[1 - place] != 0, kept, zeros)
        return node.bind(operands[0], *((kept, zeros) if place == 1 else (zeros, kept)))[0]

    return forms.Operation(node.name, node.equation.params, bind)


def _constant(grid: grids.Grid) -> grids.Grid:
    """Return the grid without the gradient of a learned scale, which `quantize` gives it."""
    return jax.tree.map(jax.lax.stop_gradient, grid)
