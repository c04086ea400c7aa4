# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Quantized NNX modules, which are NNX modules themselves."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxqat.errors import QuantizationError
from jaxqat.quant._interpret import Mode
from jaxqat.quant._models.aqt_calls import nnx_products
from jaxqat.quant._models.bound import BoundModel, QuantizedModel
from jaxqat.quant._models.nnx_scopes import name_calls
from jaxqat.quant._models.state import QUANT, QUANT_PARAMS, state_collections
from jaxqat.quant._numerics.ranges import Range
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant.recipe import Recipe


class QuantState(nnx.Variable[dict[str, Any]]):
    """Activation ranges: what jaxqat adds to a module's state."""


class QuantParam(nnx.Param[dict[str, Any]]):
    """Learned step sizes and bounds of ranges: trained like the other parameters."""


class QuantizedNNX(QuantizedModel, nnx.Module):
    """An NNX module whose convolutions and dense layers multiply integers.

    It holds a copy of the module and the state of its ranges. Ranges move in training as batch
    norm's statistics do: after `train()`, and not after `eval()`.

        model = jaxqat.quantize(module, "int8")
        model.calibrate(images)  # Once per batch, for a few batches.
        optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
        logits = model(images)

    Attributes:
        module: A copy of the module that was given.
        recipe: How it is quantized.
        quant: Activation ranges, as nested dictionaries; empty before calibration.
        quant_params: Learned step sizes and bounds, likewise; empty if nothing is learned.
        use_running_average: Whether ranges are frozen; `train` and `eval` set it.
    """

    state_arguments: ClassVar[int] = 0

    def __init__(self, module: nnx.Module, recipe: Recipe):
        self.module = nnx.clone(module)
        self.recipe = recipe
        self.quant, self.quant_params = QuantState({}), QuantParam({})
        self.use_running_average = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's result, computed on integers.

        Raises:
            QuantizationError: The module was not calibrated.
        """
        mode = Mode.FROZEN if self.use_running_average else Mode.TRAIN
        (result, updates), ranges = self._bound(kwargs, stateful=True).run(args, mode)
        nnx.update(self.module, updates)
        if mode is Mode.TRAIN:  # `quant_params` are the optimizer's.
            self.quant.set_value(state_collections(ranges)[QUANT])
        return result

    def calibrate(self, *args: Any, **kwargs: Any) -> None:
        """Observe one more batch of the module in float; only ranges change."""
        self.set_state(self.bind(**kwargs).calibrate(*args).state)

    def set_state(self, state: Mapping[Key, Range]) -> None:
        """Replace ranges and learned step sizes."""
        collections = state_collections(state)
        self.quant.set_value(collections[QUANT])
        self.quant_params.set_value(collections.get(QUANT_PARAMS, {}))

    def with_calibrated(self, bound: BoundModel) -> BoundModel:
        """Take over the ranges of a bound model."""
        self.set_state(bound.state)
        return self.bind(**bound.kwargs)

    def bind(self, *state: Any, **kwargs: Any) -> BoundModel:
        """Return the module as a function of its inputs, in inference as in training mode.

        Args:
            *state: Nothing: the module holds its variables.
            **kwargs: Keyword arguments of every call.

        Raises:
            QuantizationError: Variables were passed.
        """
        if state:
            raise QuantizationError(
                f"A quantized NNX module holds its variables, got {len(state)} arguments in their "
                "place: pass keyword arguments only."
            )
        return self._bound(kwargs, stateful=False)

    def _bound(self, kwargs: Mapping[str, Any], *, stateful: bool) -> BoundModel:
        """Bind the module.

        Args:
            kwargs: Keyword arguments of every call.
            stateful: Whether the function returns the module's state after the call.
        """
        graph, params, others = nnx.split(self.module, nnx.Param, ...)
        function = _Merged(graph, jax.tree.structure(params), stateful)
        learned = self.quant_params.get_value()
        if isinstance(learned, nnx.State):  # As an optimizer leaves it.
            learned = nnx.to_pure_dict(learned)
        variables = {
            "params": nnx.to_pure_dict(params),  # Layers are named by paths of plain dictionaries.
            "state": others,
            QUANT: self.quant.get_value(),
            **({QUANT_PARAMS: learned} if learned else {}),
        }
        return BoundModel(self, variables, kwargs, self.recipe, function)


@dataclasses.dataclass(frozen=True)
class _Merged:
    """The call of an NNX module as a `PureFunction`; equal for equal modules.

    Attributes:
        graph: The module without its arrays.
        params: Structure of its parameters.
        stateful: Whether the module's state after the call is returned.
    """

    graph: Any
    params: Any
    stateful: bool

    def __call__(
        self, params: Any, others: Mapping[str, Any], args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        given = jax.tree.unflatten(self.params, [None] * self.params.num_leaves)
        nnx.replace_by_pure_dict(given, params)
        module = nnx.merge(self.graph, given, others["state"])
        nnx_products(module)
        name_calls(module)
        result = module(*args, **kwargs)
        return result, nnx.state(module, nnx.Not(nnx.Param)) if self.stateful else {}
