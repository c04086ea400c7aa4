# pyright: strict, reportUnknownMemberType=false
"""Quantized models that take their variables as an argument, as Linen's `apply` does."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import jax
from flax.core import DenyList
from flax.core.scope import in_filter

from jaxqat.errors import QuantizationError
from jaxqat.quant._interpret import Memory, Mode
from jaxqat.quant._models.bound import BoundModel, PureFunction, QuantizedModel
from jaxqat.quant._models.checks import check_mutable
from jaxqat.quant._models.state import QUANT, QUANT_PARAMS
from jaxqat.quant._trace.arguments import split_arrays
from jaxqat.quant.recipe import Recipe

# Collections to update, as Flax names them: all or none, one name, several, all but some.
Mutable = bool | str | Sequence[str] | DenyList


class StatelessModel(QuantizedModel):
    """A quantized model whose variables are an argument.

    Attributes:
        recipe: How the model is quantized.
        memory: What training keeps for the backward pass (`jaxqat.quantize`).
    """

    recipe: Recipe
    memory: Memory

    state_arguments: ClassVar[int] = 1

    def _function(self, mutable: Mutable) -> PureFunction:
        """Return the model's computation, with these collections updated."""
        raise TypeError(f"{type(self).__name__} does not define its function.")

    def bind(self, *state: Any, **kwargs: Any) -> BoundModel:
        """Return the model with its variables and keyword arguments filled in.

        Args:
            *state: One argument, the variables.
            **kwargs: Keyword arguments of every call, such as `train=False`.

        Raises:
            QuantizationError: There are no variables, or they are no dictionary.
        """
        if len(state) != 1:
            raise QuantizationError(
                f"{type(self).__name__} does not hold its variables, and got {len(state)} "
                "arguments in their place: pass the variables, a dictionary with 'params', behind "
                "the model."
            )
        return self._bound(state[0], kwargs, mutable=False)

    def apply(self, variables: Any, *inputs: Any, mutable: Mutable = False, **kwargs: Any) -> Any:
        """Return the model's result, computed on integers.

        Args:
            variables: `params`, the model's other collections, `quant`, and `quant_params` if
                step sizes are learned.
            *inputs: The model's inputs; values that are not arrays are static.
            mutable: Collections to update and return. Ranges move if 'quant' is among them.
            **kwargs: The model's keyword arguments.

        Returns:
            The model's result; if `mutable` names collections, a pair of it and their updates.

        Raises:
            QuantizationError: The variables hold no ranges, or not this model's; frozen ranges
                have seen no data; or `mutable` has 'batch_stats' without 'quant'.
        """
        moves = in_filter(mutable, QUANT)
        if isinstance(variables, Mapping):
            check_mutable(mutable, cast("Mapping[str, Any]", variables))
        bound = self._bound(variables, kwargs, mutable=_of_model(mutable))
        mode = Mode.TRAIN if moves else Mode.FROZEN
        (result, updates), ranges = bound.run(inputs, mode)
        if mutable is False:
            return result
        if moves:
            moved = bound.with_state(ranges).variables
            names = [n for n in (QUANT, QUANT_PARAMS) if n in moved and in_filter(mutable, n)]
            updates = {**updates, **{name: moved[name] for name in names}}
        return result, updates

    def calibrate(
        self, variables: Any, *inputs: Any, mutable: Mutable = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the variables after observing one more batch of the model in float.

        Only ranges, and the values that learned step sizes start from, differ from `variables`;
        the collections are added if they are missing.

            for images in batches:
                variables = model.calibrate(variables, images, train=False)

        Args:
            variables: The model's variables.
            *inputs: One batch.
            mutable: Collections of the model that change in the mode that is observed, such as
                'batch_stats' with `train=True`. Their updates are not kept.
            **kwargs: The model's keyword arguments.
        """
        bound = self._bound(variables, kwargs, mutable=_of_model(mutable))
        return dict(bound.calibrate(*inputs).variables)

    def init_quant(
        self, variables: Any, *inputs: Any, mutable: Mutable = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the variables with ranges that have seen nothing yet.

        Only shapes and types of the inputs matter. The arguments are those of `calibrate`.
        """
        bound = self._bound(variables, kwargs, mutable=_of_model(mutable))
        return dict(bound.with_empty_ranges(*inputs).variables)

    def _bound(self, variables: Any, kwargs: Any, *, mutable: Mutable) -> BoundModel:
        if not isinstance(variables, Mapping):
            raise QuantizationError(
                "The variables must be a dictionary with 'params', got "
                f"{type(variables).__name__}: pass them before the inputs, or bind them to the "
                "model first, `model.bind(variables, train=False)`."
            )
        given = cast("Mapping[str, Any]", variables)
        return BoundModel(self, given, kwargs, self.recipe, self._function(mutable))


def _of_model(mutable: Mutable) -> Mutable:
    """Return the mutable collections without those of quantization."""
    if isinstance(mutable, (bool, DenyList)):
        return mutable
    names = [mutable] if isinstance(mutable, str) else list(mutable)
    return tuple(name for name in names if name not in (QUANT, QUANT_PARAMS))


@dataclasses.dataclass(frozen=True)
class QuantizedFunction(StatelessModel):
    """A function of (params, *inputs) with quantized products.

        model = jaxqat.quantize(function, "int8")
        variables = model.calibrate({"params": params}, inputs)
        result, updates = model.apply(variables, inputs, mutable=["quant"])

    Attributes:
        function: The function as it was given.
        recipe: How it is quantized.
        memory: What training keeps for the backward pass (`jaxqat.quantize`).
    """

    function: Callable[..., Any]
    recipe: Recipe
    memory: Memory = "values"

    def _function(self, mutable: Mutable) -> PureFunction:
        del mutable  # A function has no collections of its own.
        return _WithoutCollections(self.function)


@dataclasses.dataclass(frozen=True)
class _WithoutCollections:
    """A function of (params, *inputs) as a `PureFunction`."""

    function: Callable[..., Any]

    def __call__(self, params: Any, others: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        del others
        return self.function(params, *args, **kwargs), {}


class QuantizedEquinox(QuantizedFunction):
    """An Equinox module with quantized products, mapped over a batch.

    Its variables hold the module itself as `params`:

        model = jaxqat.quantize(module, "int8")
        variables = model.calibrate({"params": module}, batch)
        result = model.apply(variables, batch)

    Without variables, `bind` uses the module that was quantized.

    Attributes:
        module: The module as it was given.
        recipe: How it is quantized.
    """

    def __init__(self, module: Any, recipe: Recipe, memory: Memory = "values"):
        # The layers of Equinox work on single examples.
        super().__init__(_mapped, recipe, memory)
        object.__setattr__(self, "module", module)

    module: Any

    def __eq__(self, other: object) -> bool:
        return self is other  # Arrays, which a module holds, have no equality of their own.

    def __hash__(self) -> int:
        return id(self)

    def bind(self, *state: Any, **kwargs: Any) -> BoundModel:
        """Return the model with its variables, by default the module that was quantized."""
        return super().bind(*(state or ({"params": self.module},)), **kwargs)


def _mapped(module: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
    arrays, rebuild = split_arrays((inputs, keywords))

    def of_one(arrays: Any) -> Any:
        given, named = rebuild(arrays)
        return module(*given, **named)

    return jax.vmap(of_one)(arrays)
