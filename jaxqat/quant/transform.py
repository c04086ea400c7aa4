"""quantize as a transformation, like `jax.grad`: the traced function, evaluated on integers.

`QuantizedFunction` traces a function of (parameters, *inputs), plans what to quantize (`trace`),
and evaluates the same operations again with codes in the place of the planned tensors (`ops`,
`forms`). The function and its parameters stay as they are; activation ranges are a state beside
them.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.extend import core as jex_core

from jaxqat.quant import derive, forms, ops, ranges
from jaxqat.quant.program import Atom, Constant, Node, Program, inner_jaxprs, trace
from jaxqat.quant.recipe import Recipe
from jaxqat.quant.trace import (
    PARAMETERS,
    Key,
    Layer,
    LayerInfo,
    Plan,
    QuantizationError,
    Site,
    make_plan,
)


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
        source = forms.Multiplied(layer.path, layer.how.product, form, weight_codes)
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


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The array leaves of a tree, and what makes the tree from them: all other leaves are static.

    Such leaves stand among parameters too, as the functions that an Equinox module holds.
    """
    leaves, structure = jax.tree.flatten(tree)

    def rebuild(arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        return jax.tree.unflatten(structure, [next(rest) if _is_array(x) else x for x in leaves])

    return [leaf for leaf in leaves if _is_array(leaf)], rebuild


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A function's arguments, taken apart into traced arrays and everything static.

    Attributes:
        flat: The array leaves.
        names: Path of each array within the parameters; None if it is not one of them.
        is_data: Whether each array varies from call to call.
        rebuild: Makes the arguments from array leaves.
    """

    flat: list[Any]
    names: list[Key | None]
    is_data: list[bool]
    rebuild: Callable[[list[Any]], tuple[Any, ...]]

    @classmethod
    def of(cls, parameters: Any, constants: Any, inputs: Any) -> Self:
        """Takes (parameters, constants, inputs) apart; only the last varies from call to call."""
        leaves, structure = jax.tree_util.tree_flatten_with_path((parameters, constants, inputs))
        arrays = [(path, leaf) for path, leaf in leaves if _is_array(leaf)]
        statics = [None if _is_array(leaf) else (leaf,) for _, leaf in leaves]

        def rebuild(flat: list[Any]) -> tuple[Any, ...]:
            rest = iter(flat)
            return jax.tree.unflatten(
                structure, [next(rest) if s is None else s[0] for s in statics]
            )

        names = [_path(path[1:]) if path[0].idx == 0 else None for path, _ in arrays]
        is_data = [path[0].idx == 2 for path, _ in arrays]
        return cls([leaf for _, leaf in arrays], names, is_data, rebuild)


def _path(path: tuple[Any, ...]) -> Key:
    return tuple(
        str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path
    ) or ("parameters",)


@runtime_checkable
class Quantized(Protocol):
    """What `jaxqat.quantize` returns: a Linen module, an NNX module or a function.

    Attributes:
        state_arguments: How many arguments of its methods come before the inputs: variables, or
            parameters and ranges, or none for a module that holds them itself.
    """

    state_arguments: ClassVar[int]

    def record(self, *arguments: Any, **kwargs: Any) -> Evaluator:
        """The finished evaluation with frozen ranges: codes, forms, results."""
        ...

    def observe(self, *arguments: Any, **kwargs: Any) -> Evaluator:
        """The finished evaluation in float: the tensors that would be quantized, results."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFunction:
    """A function of (parameters, *inputs) with quantized products.

    Attributes:
        function: The function as it was; called as function(parameters, *inputs).
        recipe: How to quantize.
    """

    function: Callable[..., Any]
    recipe: Recipe

    state_arguments: ClassVar[int] = 2

    def __call__(self, parameters: Any, state: Any, *inputs: Any, update: bool = False) -> Any:
        """The function on integers.

        Args:
            parameters: As the function takes them.
            state: Activation ranges, from `init_ranges` or `calibrate`.
            *inputs: As the function takes them; values that are not arrays are static.
            update: Whether ranges move with this batch (a training step).

        Returns:
            The function's result; with `update`, a pair of it and the new ranges.
        """
        mode = Mode.TRAIN if update else Mode.FROZEN
        result, evaluator = self.evaluate(parameters, state, None, inputs, mode)
        return (result, nest(evaluator.new_ranges)) if update else result

    def init_ranges(self, parameters: Any, *inputs: Any) -> Any:
        """Ranges that have seen nothing yet, for every tensor that will be quantized."""
        return self.empty_ranges(self.checked_plan(Call.of(parameters, None, inputs)))

    def calibrate(self, parameters: Any, state: Any, *inputs: Any) -> Any:
        """The ranges after observing one more batch of the function in float."""
        _, evaluator = self.evaluate(parameters, state, None, inputs, Mode.CALIBRATE)
        return nest(evaluator.new_ranges)

    def describe(self, parameters: Any, *inputs: Any) -> tuple[LayerInfo, ...]:
        """Every product of the function: its bits, or why it stays in float.

        Shapes and types are enough (`jax.eval_shape`).
        """
        return self.checked_plan(Call.of(parameters, None, inputs)).table

    def codes(self, parameters: Any, state: Any, *inputs: Any) -> dict[str, Any]:
        """Codes (int8) of every quantized tensor, by the path of its range, ranges frozen."""
        evaluator = self.record(parameters, state, *inputs)
        return {"/".join(key): tensor.codes for key, tensor in evaluator.codes.items()}

    def record(self, parameters: Any, state: Any, *inputs: Any) -> Evaluator:
        """The finished evaluation with frozen ranges: codes, forms, results."""
        return self.evaluate(parameters, state, None, inputs, Mode.FROZEN)[1]

    def observe(self, parameters: Any, state: Any, *inputs: Any) -> Evaluator:
        """The finished evaluation in float: the tensors that would be quantized, results."""
        return self.evaluate(parameters, state, None, inputs, Mode.CALIBRATE)[1]

    def plan(self, call: Call) -> tuple[Plan, Any]:
        """The plan for a call, and the structure of its result."""

        def flat_function(*flat: Any) -> Any:
            parameters, constants, inputs = call.rebuild(list(flat))
            more = () if constants is None else (constants,)
            return self.function(parameters, *more, *inputs)

        program, structure = trace(flat_function, call.flat)
        return make_plan(program, call.names, call.is_data, self.recipe), structure

    def checked_plan(self, call: Call) -> Plan:
        """The plan for a call that stands for the whole model: every rule must match something.

        Raises:
            RecipeError: A rule of the recipe decides about no layer.
        """
        plan, _ = self.plan(call)
        plan.check_rules(self.recipe)
        return plan

    def evaluate(
        self, parameters: Any, state: Any, constants: Any, inputs: Any, mode: Mode
    ) -> tuple[Any, Evaluator]:
        """Runs the function in a mode; the evaluator holds ranges and codes afterwards."""
        call = Call.of(parameters, constants, inputs)
        plan, structure = self.plan(call)
        evaluator = Evaluator(plan, self.recipe, flatten(state), mode)
        results = evaluator.run(call.flat)
        return jax.tree.unflatten(structure, results), evaluator

    @staticmethod
    def empty_ranges(plan: Plan) -> Any:
        """Empty ranges for every site of a plan."""
        return nest({site.key: ranges.empty_range() for site in plan.sites.values()})


def nest(state: Mapping[Key, ranges.Range]) -> dict[str, Any]:
    """Ranges by key as nested dictionaries, the form in which they are kept and saved."""
    return traverse_util.unflatten_dict(dict(state))


def flatten(state: Any) -> dict[Key, ranges.Range]:
    """The opposite of `nest`."""
    flat: dict[Key, dict[str, Any]] = {}
    for key, value in traverse_util.flatten_dict(dict(state)).items():
        flat.setdefault(key[:-1], {})[key[-1]] = value
    return flat
