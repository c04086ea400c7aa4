"""A plan evaluated: the traced operations run again, with codes in the place of planned tensors.

Each operation is computed in floating point as the model wrote it, and beside it its integer form
(`forms`, `derive`), where it has one; a tensor of the plan is quantized from its form.
"""

import enum
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from jaxqat.quant import derive, forms, ops, ranges
from jaxqat.quant.plan import PARAMETERS, Key, Layer, Plan, QuantizationError, Site
from jaxqat.quant.program import Atom, Constant, Node, Program, inner_jaxprs
from jaxqat.quant.recipe import Recipe


class Mode(enum.Enum):
    """What happens to activation ranges: observed in float, moved while training, or frozen."""

    CALIBRATE = enum.auto()
    TRAIN = enum.auto()
    FROZEN = enum.auto()


class Evaluator:
    """Evaluates one plan.

    Attributes:
        new_ranges: All ranges after evaluation; those that it did not meet are as they were.
        codes: Codes and grid of each quantized tensor, by key, after evaluation.
        made_from: The form that each of them was quantized from.
        observed: The float tensors in their places, after calibration.
        outputs: The results with their forms.
        results: The results.
    """

    def __init__(self, plan: Plan, recipe: Recipe, state: Mapping[Key, ranges.Range], mode: Mode):
        self.plan, self.recipe, self.state, self.mode = plan, recipe, state, mode
        self.new_ranges: dict[Key, ranges.Range] = dict(state)
        self.codes: dict[Key, forms.Codes] = {}
        self.made_from: dict[Key, forms.Form] = {}
        self.observed: dict[Key, jax.Array] = {}
        self.outputs: list[derive.Operand] = []
        self.results: list[Any] = []
        self._known: dict[int, derive.Operand] = {}

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
            if layer is not None and self.mode is not Mode.CALIBRATE:
                with jax.named_scope(layer.path):  # Kernels carry the layer's name.
                    values, form = self._multiply(layer)
                self._write(node.outputs[0], values, form, None)
                continue
            operands = [self._read(a) for a in node.inputs]
            results = node.bind(*(o.values for o in operands))
            form = _form_of(node, operands, results) if len(results) == 1 else None
            blame = None if form is not None else self._blame(node, operands)
            for number, values in zip(node.outputs, results, strict=True):
                self._write(number, self._fenced(node, number, values), form, blame)
        self.outputs = [self._read(a) for a in program.outputs]
        self.results = [self._result(output) for output in self.outputs]
        return self.results

    def _result(self, output: derive.Operand) -> Any:
        """An output of the network; with frozen ranges, the integer network's number."""
        if self.mode is not Mode.FROZEN or not isinstance(output.form, forms.Accumulator):
            return output.values
        assert output.values is not None
        return ops.in_place_of(output.values, jax.lax.stop_gradient(output.form.real()))

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

    def _write(self, number: int, values: Any, form: forms.Form | None, blame: str | None) -> None:
        site = self.plan.sites.get(number)
        if site is not None:
            values, form = self._quantize(site, values, form or forms.Real(values, blame))
        constant = self.plan.level[number] == PARAMETERS
        self._known[number] = derive.Operand(values, form, constant, blame if not form else None)

    def _quantize(self, site: Site, values: Any, form: forms.Form):
        state = self._state(site)
        low, high = state["min"], state["max"]
        if self.mode is not Mode.FROZEN:
            seen = ranges.extent(values)
            self.new_ranges[site.key] = ranges.observe(state, *seen, self.recipe.range_decay)
            if self.mode is Mode.CALIBRATE:
                self.observed[site.key] = values
                return values, None
            # Ranges are used one step late, so that one pass over the tensor both quantizes and
            # observes it; before the first observation there is only the batch itself.
            low, high = (
                jnp.where(state["count"] > 0, old, new)
                for old, new in zip((low, high), seen, strict=True)
            )
        symmetric = self.recipe.activations == "symmetric"
        grid = ranges.grid(low, high, bits=site.bits, symmetric=symmetric)
        self.made_from[site.key] = form
        values, codes = ops.quantize(values, form.steps(grid), grid)
        self.codes[site.key] = forms.Codes(codes, grid, site.key)
        return values, self.codes[site.key]

    def _state(self, site: Site) -> ranges.Range:
        try:
            return self.state[site.key]
        except KeyError:
            raise QuantizationError(
                f"The ranges hold nothing for {'/'.join(site.key)!r}; they hold "
                f"{', '.join('/'.join(k) for k in self.state) or 'nothing'}. Make them with "
                "`init_ranges` for this model, this recipe and these inputs."
            ) from None

    def _multiply(self, layer: Layer) -> tuple[Any, forms.Form]:
        data, weights = self._read(layer.data), self._read(layer.weights)
        form = data.form
        assert isinstance(form, forms.Codes)  # The plan quantizes what a layer reads.
        assert data.values is not None and weights.values is not None
        result = ops.multiply(layer.how, data.values, form.codes, form.grid, weights.values)
        total, correction, weight_scale, weight_codes = jax.lax.stop_gradient(result[1:])
        how = layer.how
        source = forms.Multiplied(layer.path, how.product, form, weight_codes, how.bits)
        accumulator = forms.Accumulator(
            total, correction, form.grid.scale, weight_scale, jnp.float32(0), source
        )
        return result.real, accumulator


def _form_of(node: Node, operands: list[derive.Operand], results: list[Any]) -> forms.Form | None:
    if not jnp.issubdtype(results[0].dtype, jnp.floating):
        return None
    if node.name == "custom_jvp_call":
        return _form_inside(next(inner_jaxprs(node.equation)), operands)
    return derive.derive(_operation(node), operands, np.shape(results[0]))


def _operation(node: Node) -> forms.Operation:
    return forms.Operation(node.name, node.equation.params, lambda *x: node.bind(*x)[0])


def _form_inside(jaxpr: Any, operands: list[derive.Operand]) -> forms.Form | None:
    """The form of a call's result, from the operations in its body (as in `jax.nn.relu`)."""
    if jaxpr.constvars or len(jaxpr.outvars) != 1:
        return None
    inner = Program(jex_core.ClosedJaxpr(jaxpr, ()))
    known = dict(zip(inner.inputs, operands, strict=True))

    def read(atom: Atom) -> derive.Operand:
        return derive.Operand(atom.value, None, True) if isinstance(atom, Constant) else known[atom]

    for node in inner.nodes:
        reads = [read(a) for a in node.inputs]
        constant = all(r.constant for r in reads)
        form = None
        if len(node.outputs) == 1 and jnp.issubdtype(
            inner.avals[node.outputs[0]].dtype, jnp.floating
        ):
            shape = inner.avals[node.outputs[0]].shape
            form = (
                _form_inside(next(inner_jaxprs(node.equation)), reads)
                if node.name == "custom_jvp_call"
                else derive.derive(_operation(node), reads, shape)
            )
        known.update((number, derive.Operand(None, form, constant)) for number in node.outputs)
    return read(inner.outputs[0]).form
