"""jaxqat: int8 quantization-aware training for JAX, by transforming a model's computation."""

from jaxqat.quant import (
    LayerInfo,
    QuantizationError,
    QuantizedFunction,
    QuantizedModule,
    Recipe,
    RecipeError,
    Rule,
    quantize,
)

__version__ = "0.1.0"

__all__ = [
    "LayerInfo",
    "QuantizationError",
    "QuantizedFunction",
    "QuantizedModule",
    "Recipe",
    "RecipeError",
    "Rule",
    "__version__",
    "quantize",
]
