"""The face that Flax users see: a quantized module with Linen's `init` and `apply`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import flax.linen as nn
import jax
from flax.core import DenyList, unfreeze
from flax.core.scope import in_filter

from jaxqat.errors import QuantizationError
from jaxqat.quant._interpret import Evaluator, Mode, Switches
from jaxqat.quant._plan.plan import LayerInfo, Plan
from jaxqat.quant._trace.arguments import Call
from jaxqat.quant.models.function import QuantizedFunction, nest
from jaxqat.quant.recipe import Recipe

if TYPE_CHECKING:  # Importing flax.nnx imports optax.
    from flax import nnx

    from jaxqat.quant.models.nnx import QuantizedNNX

COLLECTION = "quant"


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedModule:
    """A Linen module whose convolutions and dense layers multiply integers.

    The variables are the module's own and one collection more, 'quant', the activation ranges.
    Ranges move when 'quant' is mutable, as batch norm's statistics do with 'batch_stats', and are
    frozen otherwise.

        model = jaxqat.quantize(ResNet(num_classes=10), Recipe.preset("int8"))
        variables["quant"] = model.init_ranges(variables, images)
        variables["quant"] = model.calibrate(variables, images)
        logits, updates = model.apply(
            variables, images, train=True, mutable=["batch_stats", "quant"]
        )

    Attributes:
        module: The module as it was.
        recipe: How to quantize.
    """

    module: nn.Module
    recipe: Recipe

    state_arguments: ClassVar[int] = 1

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's variables, and ranges that have seen nothing yet."""
        variables = unfreeze(self.module.init(rngs, *args, **kwargs))
        ranges = self.init_ranges(variables, *args, rngs=rngs, **kwargs)
        return {**variables, COLLECTION: ranges}

    def apply(
        self,
        variables: Any,
        *args: Any,
        mutable: bool | str | Sequence[str] | DenyList = False,
        rngs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The module's `apply` on integers.

        Args:
            variables: The module's variables and 'quant'.
            *args: The module's inputs; values that are not arrays are static.
            mutable: Collections to update and return; 'quant' moves the ranges.
            rngs: As Linen takes them.
            **kwargs: The module's keyword arguments.

        Returns:
            The module's result; if `mutable` names collections, a pair of it and their updates.

        Raises:
            QuantizationError: The variables hold no ranges, or not this model's.
        """
        if COLLECTION not in variables:
            raise QuantizationError(
                f"The variables have the collections {', '.join(variables)}, without 'quant': "
                "make it with `init_ranges` and `calibrate`."
            )
        moves = in_filter(mutable, COLLECTION)
        if not isinstance(mutable, (bool, DenyList)):
            mutable = [mutable] if isinstance(mutable, str) else list(mutable)
        others = (
            [name for name in mutable if name != COLLECTION]
            if isinstance(mutable, list)
            else mutable
        )
        result, evaluator = self._evaluate(
            variables, args, kwargs, rngs, others, Mode.TRAIN if moves else Mode.FROZEN
        )
        if mutable is False:
            return result
        result, updates = result if others else (result, {})
        if moves:
            updates = {**updates, COLLECTION: nest(evaluator.new_ranges)}
        return result, updates

    def init_ranges(
        self, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Ranges that have seen nothing yet: the 'quant' collection before calibration."""
        return QuantizedFunction.empty_ranges(self._plan(variables, args, kwargs, rngs))

    def calibrate(
        self, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The 'quant' collection after observing one more batch of the module in float."""
        updated = list(_split(variables)[1])  # Batch norm when it trains; not kept.
        _, evaluator = self._evaluate(variables, args, kwargs, rngs, updated, Mode.CALIBRATE)
        return nest(evaluator.new_ranges)

    def describe(
        self, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any
    ) -> tuple[LayerInfo, ...]:
        """Every product of the module: its bits, or why it stays in float.

        Shapes and types are enough (`jax.eval_shape`).
        """
        return self._plan(variables, args, kwargs, rngs).table

    def codes(self, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Codes (int8) of every quantized tensor, by the path of its range, ranges frozen."""
        evaluator = self.record(variables, *args, rngs=rngs, **kwargs)
        return {"/".join(key): tensor.codes for key, tensor in evaluator.codes.items()}

    def record(self, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> Evaluator:
        """The finished evaluation with frozen ranges: codes, forms, results."""
        return self._evaluate(variables, args, kwargs, rngs, [], Mode.FROZEN)[1]

    def observe(self, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> Evaluator:
        """The finished evaluation in float: the tensors that would be quantized, results."""
        return self._evaluate(variables, args, kwargs, rngs, [], Mode.CALIBRATE)[1]

    def switched(
        self, switches: Switches, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any
    ) -> Evaluator:
        """As `record`, with some layers in float (see `Evaluator`)."""
        return self._evaluate(variables, args, kwargs, rngs, [], Mode.FROZEN, switches)[1]

    def _plan(self, variables: Any, args: Any, kwargs: Any, rngs: Any) -> Plan:
        parameters, others, _ = _split(variables)
        call = Call.of(parameters, others, (args, kwargs, rngs))
        return self._function(list(others)).checked_plan(call)

    def _evaluate(self, variables, args, kwargs, rngs, mutable, mode, switches=None):
        parameters, others, state = _split(variables)
        inputs = (args, kwargs, rngs)
        function = self._function(mutable)
        return function.evaluate(parameters, state, others, inputs, mode, switches)

    def _function(self, mutable: Any) -> QuantizedFunction:
        def function(parameters, others, args, kwargs, rngs):
            variables = {"params": parameters, **others}
            return self.module.apply(
                variables, *args, mutable=mutable or False, rngs=rngs, **kwargs
            )

        return QuantizedFunction(function, self.recipe)


def _split(variables: Any) -> tuple[Any, dict[str, Any], Any]:
    """Parameters, the other collections of the module, and the ranges."""
    others = {k: v for k, v in variables.items() if k not in ("params", COLLECTION)}
    return variables.get("params", {}), others, variables.get(COLLECTION, {})


@overload
def quantize(model: nn.Module, recipe: Recipe | str = ...) -> QuantizedModule: ...
@overload
def quantize(model: "nnx.Module", recipe: Recipe | str = ...) -> "QuantizedNNX": ...
@overload
def quantize(model: Callable[..., Any], recipe: Recipe | str = ...) -> QuantizedFunction: ...
def quantize(model: Any, recipe: Recipe | str = "int8") -> Any:
    """A model whose convolutions and dense layers compute with int8 codes.

    Nothing of the model changes: its computation is traced when it is called, and evaluated with
    quantized products. The parameter tree is the same.

    Args:
        model: A Flax module (Linen or NNX), an Equinox module, or a function of (parameters,
            *inputs).
        recipe: A `Recipe`, or the name of a preset (`Recipe.preset`).

    Returns:
        For a Linen module, an object with Linen's `init` and `apply`. For an NNX module, an NNX
        module with a copy of it (`QuantizedNNX`). For a function, a function of
        (parameters, ranges, *inputs). For an Equinox module the same, whose parameters are the
        module and whose inputs are batches: the module is mapped over them.

    Raises:
        QuantizationError: The model is none of these.
        RecipeError: There is no such preset.
    """
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    if isinstance(model, nn.Module):
        return QuantizedModule(model, recipe)
    if _is_of("flax.nnx", model):
        from jaxqat.quant.models.nnx import QuantizedNNX

        return QuantizedNNX(model, recipe)
    if _is_of("equinox", model) and callable(model):
        # Its layers know single examples.
        return QuantizedFunction(lambda module, *inputs: jax.vmap(module)(*inputs), recipe)
    if callable(model):
        return QuantizedFunction(model, recipe)
    raise QuantizationError(
        "quantize takes a Flax module (Linen or NNX), an Equinox module or a function of "
        f"(parameters, *inputs), got {type(model).__name__}."
    )


def _is_of(package: str, model: Any) -> bool:
    """Whether a class of the package is among those of the model: known without importing it."""
    modules = {base.__module__ for base in type(model).__mro__}
    return any(name == package or name.startswith(f"{package}.") for name in modules)
