"""quantize as a transformation, like `jax.grad`: the traced function, evaluated on integers.

`QuantizedFunction` traces a function of (parameters, *inputs), plans what to quantize (`trace`),
and evaluates the same operations again with codes in the place of the planned tensors
(`evaluate`). The function and its parameters stay as they are; activation ranges are a state
beside them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
from flax import traverse_util

from jaxqat.quant._interpret import Evaluator, Mode, Switches
from jaxqat.quant._numerics import ranges
from jaxqat.quant._plan.plan import LEARNED, LayerInfo, Plan
from jaxqat.quant._plan.planner import make_plan
from jaxqat.quant._trace.arguments import Call, Key
from jaxqat.quant._trace.program import trace
from jaxqat.quant.recipe import Recipe


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

    def switched(self, switches: Switches, *arguments: Any, **kwargs: Any) -> Evaluator:
        """As `record`, with some layers in float (see `Evaluator`)."""
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

    def switched(self, switches: Switches, parameters: Any, state: Any, *inputs: Any) -> Evaluator:
        """As `record`, with some layers in float (see `Evaluator`)."""
        return self.evaluate(parameters, state, None, inputs, Mode.FROZEN, switches)[1]

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
        self,
        parameters: Any,
        state: Any,
        constants: Any,
        inputs: Any,
        mode: Mode,
        switches: Switches | None = None,
    ) -> tuple[Any, Evaluator]:
        """Runs the function in a mode; the evaluator holds ranges and codes afterwards."""
        call = Call.of(parameters, constants, inputs)
        plan, structure = self.plan(call)
        evaluator = Evaluator(plan, self.recipe, flatten(state), mode, switches)
        results = evaluator.run(call.flat)
        return jax.tree.unflatten(structure, results), evaluator

    @staticmethod
    def empty_ranges(plan: Plan) -> Any:
        """Empty ranges for every site of a plan."""
        return nest(plan.empty_state())


def nest(state: Mapping[Key, ranges.Range]) -> dict[str, Any]:
    """Ranges by key as nested dictionaries, the form in which they are kept and saved."""
    return traverse_util.unflatten_dict(dict(state))


def flatten(state: Any) -> dict[Key, ranges.Range]:
    """The opposite of `nest`."""
    flat: dict[Key, dict[str, Any]] = {}
    for key, value in traverse_util.flatten_dict(dict(state)).items():
        flat.setdefault(key[:-1], {})[key[-1]] = value
    return flat


def split_learned(state: Any) -> tuple[Any, Any]:
    """Ranges taken apart into what gradients train, step sizes and bounds, and all else.

        learned, rest = jaxqat.split_learned(variables["quant"])
        def loss(trained):
            parameters, learned = trained
            variables = {"params": parameters, "quant": jaxqat.join_learned(learned, rest)}
            ...

    Calibrate first: what learning starts from is found there. Without learned ranges ('lsq',
    'pact') the first part is empty.
    """
    flat, leaves = traverse_util.flatten_dict(dict(state)), set(LEARNED.values())
    parts = [
        {k: v for k, v in flat.items() if (k[-1] in leaves) == learned} for learned in (True, False)
    ]
    return traverse_util.unflatten_dict(parts[0]), traverse_util.unflatten_dict(parts[1])


def join_learned(learned: Any, rest: Any) -> Any:
    """The opposite of `split_learned`."""
    flat = {**traverse_util.flatten_dict(dict(rest)), **traverse_util.flatten_dict(dict(learned))}
    return traverse_util.unflatten_dict(flat)
