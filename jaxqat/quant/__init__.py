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
