"""The quantization core: what is quantized, with which ranges, by which integer arithmetic."""

from jaxqat.quant.calibrate import calibrate
from jaxqat.quant.flax import QuantizedModule, quantize
from jaxqat.quant.plan import LayerInfo, QuantizationError
from jaxqat.quant.recipe import Recipe, RecipeError, Rule
from jaxqat.quant.transform import QuantizedFunction, join_learned, split_learned

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
