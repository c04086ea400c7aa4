"""A plan evaluated: the traced operations run again, with codes in the place of planned tensors.

Each operation is computed in floating point as the model wrote it, and beside it its integer form
(`forms`, `derive`), where it has one; a tensor of the plan is quantized from its form.
"""

import enum
from collections.abc import Callable, Mapping
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


# Whether each layer is quantized, by its path: booleans, known only when the program runs.
Switches = Mapping[str, Any]


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
        products: Layer, weights and result of each planned product, real values, in order.
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
        self.products: list[tuple[Layer, Any, Any]] = []
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
                    values, form = self._multiply(node, layer)
                self._write(node.outputs[0], values, form, None, self._switch(layer.path))
                self.products.append((layer, self._read(layer.weights).values, values))
                continue
            operands = [self._read(a) for a in node.inputs]
            results = node.bind(*(o.values for o in operands))
            form = _form_of(node, operands, results) if len(results) == 1 else None
            blame = None if form is not None else self._blame(node, operands)
            holds = True
            if form is not None:
                holds = derive.any_of(o.holds for o in operands if o.form is not None)
            for number, values in zip(node.outputs, results, strict=True):
                self._write(number, self._fenced(node, number, values), form, blame, holds)
            if layer is not None:
                self.products.append((layer, self._read(layer.weights).values, results[0]))
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
        return ops.in_place_of(output.values, jax.lax.stop_gradient(real))

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

    def _multiply(self, node: Node, layer: Layer) -> tuple[Any, forms.Form]:
        data, weights = self._read(layer.data), self._read(layer.weights)
        form = data.form
        assert isinstance(form, forms.Codes)  # The plan quantizes what a layer reads.
        assert data.values is not None and weights.values is not None
        operands = (layer.how, data.values, form.codes, form.grid, weights.values)
        result = self._product(node, layer, lambda: ops.multiply(*operands))
        total, correction, weight_scale, weight_codes = jax.lax.stop_gradient(result[1:])
        source = forms.Multiplied(layer.path, layer.how.product, form, weight_codes)
        accumulator = forms.Accumulator(
            total, correction, form.grid.scale, weight_scale, jnp.float32(0), source
        )
        return result.real, accumulator

    def _product(self, node: Node, layer: Layer, quantized: Callable[[], Any]) -> Any:
        """The integer product; of a layer that is off, the float one in its place."""
        on = self._switch(layer.path)
        if on is True:
            return quantized()

        def real() -> Any:
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(quantized))
            return nothing._replace(real=node.bind(*(self._read(a).values for a in node.inputs))[0])

        return jax.lax.cond(on, quantized, real)


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
