# pyright: strict, reportUnknownMemberType=false
"""The quantization core: what is quantized, with which ranges, by which integer arithmetic."""

from jaxqat.quant._plan.plan import LayerInfo
from jaxqat.quant.models.batch_norm import (
    BatchNormEstimate,
    BatchNormWarning,
    estimate_batch_norm,
    reestimate_batch_norm,
)
from jaxqat.quant.models.bound import BoundModel, QuantizedModel
from jaxqat.quant.models.calibration import calibrate
from jaxqat.quant.models.linen import QuantizedModule
from jaxqat.quant.models.quantize import quantize
from jaxqat.quant.models.stateless import QuantizedEquinox, QuantizedFunction
from jaxqat.quant.models.training_step import StepWarning, jit_step
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
