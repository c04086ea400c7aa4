# pyright: strict, reportUnknownMemberType=false
"""Quantized Linen modules, with Linen's `init` and `apply`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.core import unfreeze  # pyright: ignore[reportUnknownVariableType]

from jaxqat.quant.models.bound import PureFunction
from jaxqat.quant.models.stateless import Mutable, StatelessModel
from jaxqat.quant.recipe import Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedModule(StatelessModel):
    """A Linen module whose convolutions and dense layers multiply integers.

    The variables are the module's own and two more collections: `quant`, the activation ranges,
    and `quant_params`, the learned step sizes if the recipe learns any. Ranges move when 'quant'
    is mutable, as batch norm's statistics do with 'batch_stats', and are frozen otherwise.

        model = jaxqat.quantize(ResNet(num_classes=10), "int8")
        variables = model.calibrate(variables, images, train=False)
        logits, updates = model.apply(
            variables, images, train=True, mutable=["batch_stats", "quant"]
        )

    Attributes:
        module: The module as it was given.
        recipe: How it is quantized.
    """

    module: nn.Module
    recipe: Recipe

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the module's variables, and ranges that have seen nothing yet."""
        variables = unfreeze(self.module.init(rngs, *args, **kwargs))
        # As in Linen's `init`, which may run in training mode, every collection may change.
        return self.init_quant(variables, *args, mutable=True, rngs=rngs, **kwargs)

    def _function(self, mutable: Mutable) -> PureFunction:
        def function(
            params: Any, others: Mapping[str, Any], args: Any, kwargs: Any
        ) -> tuple[Any, Any]:
            variables = {"params": params, **others}
            result = self.module.apply(variables, *args, mutable=mutable, **kwargs)
            # Linen returns a pair for every `mutable` but False.
            return (result, {}) if mutable is False else result

        return function
