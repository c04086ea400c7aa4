# pyright: strict, reportUnknownMemberType=false
"""The core: a float model becomes a computation on integers.

    _trace      the model's operations, as a flat program
    _plan       which tensors and products of it are quantized, by which settings of the `recipe`
    _numerics   ranges, grids, codes, integer products and their gradients
    _forms      how each operation carries codes and accumulators along
    _interpret  runs the plan: to calibrate, to train, or with frozen ranges
    models      Linen, NNX, Equinox and functions behind one interface, `BoundModel`

ARCHITECTURE.md has the picture.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxqat.quant._models.batch_norm import (
        BatchNormEstimate,
        BatchNormWarning,
        estimate_batch_norm,
        reestimate_batch_norm,
    )
    from jaxqat.quant._models.bound import BoundModel, QuantizedModel
    from jaxqat.quant._models.calibration import calibrate
    from jaxqat.quant._models.linen import QuantizedModule
    from jaxqat.quant._models.quantize import quantize
    from jaxqat.quant._models.stateless import QuantizedEquinox, QuantizedFunction
    from jaxqat.quant._models.training_step import StepWarning, jit_step
    from jaxqat.quant._plan.plan import LayerInfo
    from jaxqat.quant.recipe import Recipe, Rule, Settings

# The module of each name, loaded at first use: `recipe` needs no JAX, and so neither does `--help`.
_HOMES = {
    "BatchNormEstimate": "jaxqat.quant._models.batch_norm",
    "BatchNormWarning": "jaxqat.quant._models.batch_norm",
    "BoundModel": "jaxqat.quant._models.bound",
    "LayerInfo": "jaxqat.quant._plan.plan",
    "QuantizedEquinox": "jaxqat.quant._models.stateless",
    "QuantizedFunction": "jaxqat.quant._models.stateless",
    "QuantizedModel": "jaxqat.quant._models.bound",
    "QuantizedModule": "jaxqat.quant._models.linen",
    "Recipe": "jaxqat.quant.recipe",
    "Rule": "jaxqat.quant.recipe",
    "Settings": "jaxqat.quant.recipe",
    "StepWarning": "jaxqat.quant._models.training_step",
    "calibrate": "jaxqat.quant._models.calibration",
    "estimate_batch_norm": "jaxqat.quant._models.batch_norm",
    "jit_step": "jaxqat.quant._models.training_step",
    "quantize": "jaxqat.quant._models.quantize",
    "reestimate_batch_norm": "jaxqat.quant._models.batch_norm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


__all__ = [
    "BatchNormEstimate",
    "BatchNormWarning",
    "BoundModel",
    "LayerInfo",
    "QuantizedEquinox",
    "QuantizedFunction",
    "QuantizedModel",
    "QuantizedModule",
    "Recipe",
    "Rule",
    "Settings",
    "StepWarning",
    "calibrate",
    "estimate_batch_norm",
    "jit_step",
    "quantize",
    "reestimate_batch_norm",
]
