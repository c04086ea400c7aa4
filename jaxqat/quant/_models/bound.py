# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""One interface for all kinds of models: a quantized model bound to its variables.

Linen modules, functions and Equinox modules take their variables as an argument; NNX modules hold
them. Bound to its variables, each is the same thing: a pure function of inputs, together with the
arrays it depends on. Calibration, conversion, verification and analysis see only that.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax

from jaxqat.errors import QuantizationError
from jaxqat.quant._interpret import Evaluator, Mode, Switches
from jaxqat.quant._models.checks import check_seen
from jaxqat.quant._models.compiled import CallPlanner, PlannedCall, evaluator_class, planner_of
from jaxqat.quant._models.state import (
    QUANT,
    QUANT_PARAMS,
    check_finite,
    flat_state,
    state_collections,
)
from jaxqat.quant._numerics.ranges import Range
from jaxqat.quant._plan.plan import LEARNED, LayerInfo, Plan, by_call
from jaxqat.quant._trace.arguments import Call, Key, split_arrays
from jaxqat.quant.recipe import Recipe

# (params, other collections, args, kwargs) -> (result, updates of the other collections)
PureFunction = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]


class QuantizedModel:
    """What `jaxqat.quantize` returns, whatever kind of model it was given.

    `convert`, `describe`, `verify`, `analyze` and `calibrate` take a quantized model followed by
    the arguments of its call: variables and inputs, or only inputs for a model that holds its
    variables.

    Attributes:
        state_arguments: How many arguments of the model's call precede the inputs: 1 (variables),
            or 0 for a model that holds its variables.
    """

    state_arguments: ClassVar[int]

    def bind(self, *state: Any, **kwargs: Any) -> "BoundModel":
        """Return the model with its variables and keyword arguments filled in.

        Args:
            *state: The variables, for a model that does not hold them.
            **kwargs: Keyword arguments of every call, such as `train=False`.
        """
        raise TypeError(f"{type(self).__name__} does not define `bind`.")

    def with_calibrated(self, bound: "BoundModel") -> "BoundModel":
        """Take over the ranges of a bound model, if this model holds its variables."""
        return bound

    def bind_call(
        self, arguments: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "tuple[BoundModel, tuple[Any, ...]]":
        """Split the arguments of a call into the bound model and the inputs."""
        count = self.state_arguments
        return self.bind(*arguments[:count], **kwargs), arguments[count:]

    def layers(self, *arguments: Any, **kwargs: Any) -> tuple[LayerInfo, ...]:
        """Return every product of the model: its bits, or why it stays in float.

        Only shapes and types of the arguments matter (`jax.eval_shape`).
        """
        bound, inputs = self.bind_call(arguments, kwargs)
        return bound.checked_plan(inputs).table

    def codes(self, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the int8 codes of every quantized tensor, by the path of its range."""
        evaluator = self.record(*arguments, **kwargs)
        return {"/".join(key): tensor.codes for key, tensor in evaluator.codes.items()}

    def record(self, *arguments: Any, **kwargs: Any) -> Evaluator:
        """Return the finished evaluation with frozen ranges: codes, forms, results."""
        bound, inputs = self.bind_call(arguments, kwargs)
        return bound.evaluate(inputs, Mode.FROZEN)[1]

    def observe(self, *arguments: Any, **kwargs: Any) -> Evaluator:
        """Return the finished evaluation in float: the tensors to be quantized, results."""
        bound, inputs = self.bind_call(arguments, kwargs)
        return bound.evaluate(inputs, Mode.CALIBRATE)[1]

    def switched(self, switches: Switches, *arguments: Any, **kwargs: Any) -> Evaluator:
        """Return `record` with some layers in float (see `Evaluator`)."""
        bound, inputs = self.bind_call(arguments, kwargs)
        return bound.evaluate(inputs, Mode.FROZEN, switches)[1]


def check_quantized(model: Any, caller: str) -> None:
    """Refuse what `jaxqat.quantize` or `jaxqat.calibrate` did not return.

    Raises:
        QuantizationError: Names the caller and the type.
    """
    if not isinstance(model, QuantizedModel):
        raise QuantizationError(
            f"{caller} needs what `jaxqat.quantize` returned, got {type(model).__name__}."
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BoundModel(QuantizedModel):
    """A quantized model with its variables: a function of inputs alone, with frozen ranges.

        network = jaxqat.calibrate(module, variables, batches=batches, train=False)
        logits = network(images)

    Attributes:
        model: The quantized model.
        variables: Its variables: `params`, the model's other collections, `quant` and, if step
            sizes are learned, `quant_params`.
        kwargs: Keyword arguments of every call.
        recipe: How the model is quantized.
        function: The model's computation, in float.
    """

    model: Any  # A `QuantizedModel` of the kind that was given.
    variables: Mapping[str, Any]
    kwargs: Mapping[str, Any]
    recipe: Recipe
    function: PureFunction

    state_arguments: ClassVar[int] = 0

    def __repr__(self) -> str:
        return f"BoundModel({type(self.model).__name__}, variables: {', '.join(self.variables)})"

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the model's result, computed on integers with frozen ranges."""
        (result, _), _ = self.bind(**kwargs).run(inputs, Mode.FROZEN)
        return result

    def bind(self, *state: Any, **kwargs: Any) -> "BoundModel":
        """Return the bound model with more keyword arguments."""
        if state:
            raise QuantizationError(
                f"A bound model holds its variables and takes inputs only, got {len(state)} more "
                "arguments."
            )
        return dataclasses.replace(self, kwargs={**self.kwargs, **kwargs})

    def calibrate(self, *inputs: Any) -> "BoundModel":
        """Return the bound model after observing one more batch in float.

        Raises:
            QuantizationError: The values of a tensor are not finite.
        """
        plan = self.checked_plan(inputs)
        bound = self if self.state else self.with_state(plan.empty_state())
        _check_learned(plan, bound.state)
        _, ranges = bound.run(inputs, Mode.CALIBRATE)
        check_finite(ranges)
        return bound.with_state(ranges)

    def with_empty_ranges(self, *inputs: Any) -> "BoundModel":
        """Return the bound model with ranges that have seen nothing yet."""
        return self.with_state(self.checked_plan(inputs).empty_state())

    def with_state(self, state: Mapping[Key, Range]) -> "BoundModel":
        """Return the bound model with another state of its quantized tensors."""
        others = {k: v for k, v in self.variables.items() if k not in (QUANT, QUANT_PARAMS)}
        return dataclasses.replace(self, variables={**others, **state_collections(state)})

    def with_variables(self, **collections: Any) -> "BoundModel":
        """Return the bound model with some collections replaced.

        Replace the parameters to differentiate by them:

            gradient = jax.grad(lambda params: loss(network.with_variables(params=params)(images)))
        """
        return dataclasses.replace(self, variables={**self.variables, **collections})

    def split_arrays(self) -> "tuple[list[Any], Callable[[Any], BoundModel]]":
        """Return the arrays of the variables, and what rebuilds the bound model from them.

        The arrays can then be an argument of a compiled function.
        """
        arrays, rebuild = split_arrays(self.variables)
        return arrays, lambda arrays: dataclasses.replace(self, variables=rebuild(arrays))

    def evaluate(
        self, inputs: tuple[Any, ...], mode: Mode, switches: Switches | None = None
    ) -> tuple[Any, Evaluator]:
        """Run the model in a mode.

        Returns:
            The pair of result and updated collections; the evaluator, with ranges and codes.

        Raises:
            QuantizationError: The variables lack ranges, or hold those of another model, or of
                another number of calls of a layer; frozen ranges have seen no data; or a layer
                reads uint8 images as they are.
        """
        call, state = self._call(inputs), self.state
        plan, structure = self._checked_call(call, state, mode)
        kind = evaluator_class(mode, self.model.memory)
        evaluator = kind(plan, self.recipe, state, mode, switches)
        returned = jax.tree.unflatten(structure, evaluator.run(call.flat))
        leaves: Any = jax.tree_util.tree_flatten_with_path(returned)[0]
        evaluator.paths = [path for path, _ in leaves]
        return returned, evaluator

    def run(self, inputs: tuple[Any, ...], mode: Mode) -> tuple[Any, dict[Key, Range]]:
        """Run the model in a mode, as one compiled program unless JAX traces the call.

        Returns:
            The pair of result and updated collections; the ranges after the call, if they move.

        Raises:
            QuantizationError: As for `evaluate`.
        """
        call, state = self._call(inputs), self.state
        planner = self._planner(call)
        self._checked_call(call, state, mode)
        result = planner.run(call.flat, state, mode)
        if result is None:
            returned, evaluator = self.evaluate(inputs, mode)
            return returned, evaluator.new_ranges
        return result

    def _planner(self, call: Call) -> CallPlanner:
        return planner_of(self.function, call, self.recipe, self.model.memory)

    def _checked_call(self, call: Call, state: Mapping[Key, Range], mode: Mode) -> PlannedCall:
        planned = self._planner(call).planned(call.flat)
        if mode is not Mode.CALIBRATE:
            _check_state(planned.plan, self.variables, state)
        if mode is Mode.FROZEN:
            check_seen(planned.plan, state)
        _check_calls(planned.plan, state)
        return planned

    def checked_plan(self, inputs: tuple[Any, ...]) -> Plan:
        """Return the plan for a call; every rule of the recipe must match something.

        Raises:
            RecipeError: A rule of the recipe matches no layer.
        """
        call = self._call(inputs)
        plan = self._planner(call).planned(call.flat).plan
        plan.check_rules(self.recipe)
        return plan

    @property
    def state(self) -> dict[Key, Range]:
        """The state of every quantized tensor, by key."""
        return flat_state(self.variables)

    def _call(self, inputs: tuple[Any, ...]) -> Call:
        given = dict(self.variables)
        params = given.pop("params", {})
        others = {k: v for k, v in given.items() if k not in (QUANT, QUANT_PARAMS)}
        return Call.of(params, others, (inputs, dict(self.kwargs)))


def _check_state(plan: Plan, variables: Mapping[str, Any], state: Mapping[Key, Range]) -> None:
    """Refuse variables that lack one of the two collections of quantization."""
    needed = plan.empty_state()
    learned = set(LEARNED.values())
    observed = any(leaf not in learned for tensor in needed.values() for leaf in tensor)
    if (observed and not variables.get(QUANT)) or (needed and not state):
        if variables.get(QUANT_PARAMS):
            raise QuantizationError(
                "No activation ranges: the variables have 'quant_params' without 'quant'. Pass "
                "both collections that `calibrate` returned."
            )
        raise QuantizationError(
            "No activation ranges. Call `calibrate` on a few batches first, and pass the variables "
            "that it returns."
        )
    _check_learned(plan, state)


def _check_learned(plan: Plan, state: Mapping[Key, Range]) -> None:
    """Refuse a state that lacks learned values, as that of a recipe that learns none."""
    learned = set(LEARNED.values())
    missing = [
        f"{'/'.join(key)}/{leaf}"
        for key, tensor in plan.empty_state().items()
        for leaf in learned.intersection(tensor)
        if key in state and leaf not in state[key]
    ]
    if missing:
        raise QuantizationError(
            f"The collection 'quant_params' lacks {missing[0]!r} ({len(missing)} learned values in "
            "all). Pass both collections that `calibrate` returned, 'quant' and 'quant_params'; "
            "for another recipe, calibrate anew from the variables without them."
        )


def _check_calls(plan: Plan, state: Mapping[Key, Range]) -> None:
    """Refuse ranges of a layer that was called more or less often when they were made.

    Ranges of one layer are told apart by the order of its calls alone. Layers that this call does
    not have, such as an auxiliary classifier's in inference, may have any number of them.
    """
    held = by_call(key for key, tensor in state.items() if "min" in tensor)
    for key, met in by_call(plan.by_key()).items():
        made = held.get(key, [])
        if made and len(made) != len(met):
            path = "/".join(key[:-1])
            counted = f"calls of the layer {path!r}"
            if key[-1] != "input":
                counted = f"quantized tensors {'/'.join(key)!r}"
            raise QuantizationError(
                f"The ranges were made with {len(made)} {counted}, and this call of the model has "
                f"{len(met)}. They are told apart by their order alone, so one would get the range "
                f"of another. Call {path!r} equally often in training and in inference, give each "
                "call a module of its own, or make new ranges with `calibrate` for this call."
            )
