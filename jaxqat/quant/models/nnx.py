"""The face that NNX users see: a quantized module that is a module itself."""

from typing import Any, ClassVar

import jax
from flax import nnx

from jaxqat.errors import QuantizationError
from jaxqat.quant._interpret import Evaluator, Mode, Switches
from jaxqat.quant._plan.plan import LayerInfo, Plan
from jaxqat.quant._trace.arguments import Call
from jaxqat.quant.models.function import QuantizedFunction, join_learned, nest, split_learned
from jaxqat.quant.recipe import Recipe


class QuantRanges(nnx.Variable):
    """Activation ranges: what jaxqat adds to a module's state."""


class QuantSteps(nnx.Param):
    """Learned step sizes and bounds of ranges: trained as the other parameters are."""


class QuantizedNNX(nnx.Module):
    """An NNX module whose convolutions and dense layers multiply integers.

    It holds a copy of the module, and the ranges as one variable more. Ranges move in training as
    batch norm's statistics do: after `train()`, and not after `eval()`.

        model = jaxqat.quantize(module, "int8")
        model.calibrate(images)  # Once a batch, a few batches.
        optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
        logits = model(images)

    Attributes:
        module: A copy of the module that was given.
        recipe: How to quantize.
        ranges: Activation ranges, as nested dictionaries; empty before calibration.
        steps: What of them is learned ('lsq', 'pact'), likewise.
        use_running_average: Whether ranges are frozen; `train` and `eval` set it.
    """

    state_arguments: ClassVar[int] = 0

    def __init__(self, module: nnx.Module, recipe: Recipe):
        self.module = nnx.clone(module)
        self.recipe = recipe
        self.ranges, self.steps = QuantRanges({}), QuantSteps({})
        self.use_running_average = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result, computed on integers.

        Raises:
            QuantizationError: There are no ranges yet.
        """
        mode = Mode.FROZEN if self.use_running_average else Mode.TRAIN
        (result, state), evaluator = self._evaluate(args, kwargs, mode, keep=True)
        nnx.update(self.module, state)
        if mode is Mode.TRAIN:  # Steps are the optimizer's.
            self.ranges.set_value(split_learned(nest(evaluator.new_ranges))[1])
        return result

    def all_ranges(self) -> dict[str, Any]:
        """Ranges, with what of them is learned."""
        steps = self.steps.get_value()
        if isinstance(steps, nnx.State):  # So an optimizer leaves them.
            steps = nnx.to_pure_dict(steps)
        return join_learned(steps, self.ranges.get_value())

    def set_ranges(self, ranges: dict[str, Any]) -> None:
        """Puts other ranges, with what of them is learned, in the place of these."""
        learned, rest = split_learned(ranges)
        self.steps.set_value(learned)
        self.ranges.set_value(rest)

    def init_ranges(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Ranges that have seen nothing yet; the module is not changed."""
        return QuantizedFunction.empty_ranges(self._plan(args, kwargs))

    def with_ranges(self, ranges: dict[str, Any]) -> "QuantizedNNX":
        """A copy that has these ranges."""
        copy = nnx.clone(self)
        copy.set_ranges(ranges)
        return copy

    def calibrate(self, *args: Any, **kwargs: Any) -> None:
        """Observe one more batch of the module in float; only ranges change."""
        if not self.ranges.get_value():
            self.set_ranges(self.init_ranges(*args, **kwargs))
        evaluator = self.observe(*args, **kwargs)
        self.set_ranges(nest(evaluator.new_ranges))

    def describe(self, *args: Any, **kwargs: Any) -> tuple[LayerInfo, ...]:
        """Every product of the module: its bits, or why it stays in float."""
        return self._plan(args, kwargs).table

    def codes(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Codes (int8) of every quantized tensor, by the path of its range, ranges frozen."""
        evaluator = self.record(*args, **kwargs)
        return {"/".join(key): tensor.codes for key, tensor in evaluator.codes.items()}

    def record(self, *args: Any, **kwargs: Any) -> Evaluator:
        """The finished evaluation with frozen ranges: codes, forms, results."""
        return self._evaluate(args, kwargs, Mode.FROZEN)[1]

    def observe(self, *args: Any, **kwargs: Any) -> Evaluator:
        """The finished evaluation in float: the tensors that would be quantized, results."""
        return self._evaluate(args, kwargs, Mode.CALIBRATE)[1]

    def switched(self, switches: Switches, *args: Any, **kwargs: Any) -> Evaluator:
        """As `record`, with some layers in float (see `Evaluator`)."""
        return self._evaluate(args, kwargs, Mode.FROZEN, switches=switches)[1]

    def _plan(self, args: Any, kwargs: Any) -> Plan:
        function, parameters, others = self._function(keep=False)
        return function.checked_plan(Call.of(parameters, others, (args, kwargs)))

    def _evaluate(
        self,
        args: Any,
        kwargs: Any,
        mode: Mode,
        *,
        keep: bool = False,
        switches: Switches | None = None,
    ) -> Any:
        function, parameters, others = self._function(keep)
        ranges = self.all_ranges()
        if not ranges and mode is not Mode.CALIBRATE and self.init_ranges(*args, **kwargs):
            raise QuantizationError(
                "The module has no activation ranges yet: make them with `calibrate` on a few "
                "batches."
            )
        return function.evaluate(parameters, ranges, others, (args, kwargs), mode, switches)

    def _function(self, keep: bool) -> tuple[QuantizedFunction, Any, Any]:
        """The module as a function of its state.

        Args:
            keep: Whether the function returns the state after the call beside the result.
        """
        graph, parameters, others = nnx.split(self.module, nnx.Param, ...)

        def function(values: Any, others: Any, args: Any, kwargs: Any) -> Any:
            given = jax.tree.map(lambda x: x, parameters)  # A copy: what follows changes it.
            nnx.replace_by_pure_dict(given, values)
            module = nnx.merge(graph, given, others)
            result = module(*args, **kwargs)
            return (result, nnx.state(module, nnx.Not(nnx.Param))) if keep else result

        # Layers are named by the paths of plain dictionaries.
        return QuantizedFunction(function, self.recipe), nnx.to_pure_dict(parameters), others
