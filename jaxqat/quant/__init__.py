"""The quantization core: what is quantized, with which ranges, by which integer arithmetic."""

from jaxqat.errors import QuantizationError, RecipeError
from jaxqat.quant._plan.plan import LayerInfo
from jaxqat.quant.models.calibrate import calibrate
from jaxqat.quant.models.function import QuantizedFunction, join_learned, split_learned
from jaxqat.quant.models.linen import QuantizedModule, quantize
from jaxqat.quant.recipe import Recipe, Rule

__all__ = [
    "LayerInfo",
    "QuantizationError",
    "QuantizedFunction",
    "QuantizedModule",
    "Recipe",
    "RecipeError",
    "Rule",
    "calibrate",
    "join_learned",
    "quantize",
    "split_learned",
]
