# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Calls of quantized models, traced and compiled once for each shape of their arrays.

JAX decides when a trace can be used again: `jax.jit` keys it by shapes, types and the configuration
(precision, 64 bits, meshes). What is no array is part of the key here. As with `jax.jit`, a
function that reads something that changes, such as a global variable, keeps what it read first.
"""

import dataclasses
import functools
import threading
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from jaxqat.quant._interpret import Evaluator, Mode
from jaxqat.quant._models.aqt_calls import Configurations, collected, with_rules
from jaxqat.quant._models.checks import check_input_types
from jaxqat.quant._numerics import cpu
from jaxqat.quant._numerics.ranges import Range
from jaxqat.quant._plan.plan import Plan
from jaxqat.quant._plan.planner import make_plan
from jaxqat.quant._trace.arguments import Call, Key
from jaxqat.quant._trace.program import Program
from jaxqat.quant.recipe import Recipe

# How many models, each with the static arguments of its calls, keep their programs.
KEPT = 128

State = Mapping[Key, Range]


class PlannedCall(NamedTuple):
    """A plan, and the structure of what the model returns."""

    plan: Plan
    structure: Any


class CallPlanner:
    """Plans and runs a model's calls, for one choice of what is no array.

    Args:
        function: The model's computation (`bound.PureFunction`).
        call: A call of it; its arrays are not kept.
        recipe: How the model is quantized.
    """

    def __init__(self, function: Any, call: Call, recipe: Recipe):
        self._function, self._recipe = function, recipe
        self._call = dataclasses.replace(call, flat=[])
        self._jitted = jax.jit(self._flat_function)
        self._compiled = {mode: jax.jit(functools.partial(self._evaluate, mode)) for mode in Mode}
        self._found: Configurations = {}
        # By trace, which JAX keeps as long as it can be used again.
        self._configurations: weakref.WeakKeyDictionary[Any, Configurations]
        self._configurations, self._planned = (
            weakref.WeakKeyDictionary(),
            weakref.WeakKeyDictionary(),
        )
        self._lock = threading.RLock()
        self._is_pure = True

    def planned(self, flat: list[Any]) -> PlannedCall:
        """Return the plan for arrays of these shapes and types.

        Raises:
            RecipeError: The recipe does not fit the model.
            QuantizationError: A layer reads uint8 images as they are.
        """
        with self._lock:
            if not self._is_pure:
                return self._planned_once(flat)
            traced = self._jitted.trace(flat)
            closed = traced.jaxpr
            found = self._configurations.setdefault(closed, self._found)
            if closed in self._planned:
                return self._planned[closed]
            if len(closed.jaxpr.invars) != len(flat):
                # It closes over values of a trace around it; they became inputs of this one.
                self._is_pure = False
                return self._planned_once(flat)
            planned = self._plan(closed, traced.out_info, found)
            self._planned[closed] = planned
            return planned

    def _planned_once(self, flat: list[Any]) -> PlannedCall:
        """Return the plan of a trace of its own."""

        def function(flat: list[Any]) -> Any:  # Another one at each call: JAX keeps traces by it.
            return self._flat_function(flat)

        closed, result = jax.make_jaxpr(function, return_shape=True)(flat)
        return self._plan(closed, result, self._found)

    def run(self, flat: list[Any], state: State, mode: Mode) -> tuple[Any, dict[Key, Range]] | None:
        """Return the model's result and the ranges after it, from a compiled program.

        Returns:
            None if the call is part of another trace, which compiles it; or if the model closes
            over values of a trace.
        """
        leaves = (*flat, *(leaf for tensor in state.values() for leaf in tensor.values()))
        if not self._is_pure or cpu.is_active() or any(isinstance(x, Tracer) for x in leaves):
            return None
        results, ranges = self._compiled[mode](flat, dict(state))
        return jax.tree.unflatten(self.planned(flat).structure, results), ranges

    def _evaluate(
        self, mode: Mode, flat: list[Any], state: State
    ) -> tuple[list[Any], dict[Key, Range]]:
        evaluator = Evaluator(self.planned(flat).plan, self._recipe, state, mode)
        results = evaluator.run(flat)
        return results, {} if mode is Mode.FROZEN else evaluator.new_ranges

    def _flat_function(self, flat: list[Any]) -> Any:
        params, others, (args, kwargs) = self._call.rebuild(flat)
        with collected() as self._found:
            return self._function(params, others, args, kwargs)

    def _plan(self, closed_jaxpr: Any, result: Any, found: Configurations) -> PlannedCall:
        recipe = with_rules(self._recipe, found)
        plan = make_plan(Program(closed_jaxpr), self._call.names, self._call.kinds, recipe)
        check_input_types(plan)
        return PlannedCall(plan, jax.tree.structure(result))


@dataclasses.dataclass(frozen=True)
class _Calls:
    """What calls share that are planned together."""

    function: Any
    recipe: Recipe
    static: Any
    call: Call = dataclasses.field(compare=False)


def planner_of(function: Any, call: Call, recipe: Recipe) -> CallPlanner:
    """Return what plans and runs a call: the same for calls that differ in their arrays alone."""
    key = _Calls(function, recipe, call.static, dataclasses.replace(call, flat=[]))
    try:
        hash(key)
    except TypeError:  # An argument, or an attribute of the module, has no hash.
        return CallPlanner(function, call, recipe)
    return _kept(key)


@functools.lru_cache(maxsize=KEPT)
def _kept(key: _Calls) -> CallPlanner:
    return CallPlanner(key.function, key.call, key.recipe)
