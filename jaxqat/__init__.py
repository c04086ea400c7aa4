"""jaxqat: int8 quantization-aware training for JAX, by transforming a model's computation."""

from jaxqat.analysis import Analysis, analyze
from jaxqat.integer.convert import ConversionError, convert
from jaxqat.integer.describe import Description, describe
from jaxqat.integer.execute import ExecutionError, Executor, make_executor
from jaxqat.integer.graph import GraphError, IntegerGraph
from jaxqat.integer.store import ArtifactError, load, save
from jaxqat.integer.verify import Verification, verify
from jaxqat.quant import (
    LayerInfo,
    QuantizationError,
    QuantizedFunction,
    QuantizedModule,
    Recipe,
    RecipeError,
    Rule,
    calibrate,
    join_learned,
    quantize,
    split_learned,
)

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "ArtifactError",
    "ConversionError",
    "Description",
    "ExecutionError",
    "Executor",
    "GraphError",
    "IntegerGraph",
    "LayerInfo",
    "QuantizationError",
    "QuantizedFunction",
    "QuantizedModule",
    "Recipe",
    "RecipeError",
    "Rule",
    "Verification",
    "__version__",
    "analyze",
    "calibrate",
    "convert",
    "describe",
    "join_learned",
    "load",
    "make_executor",
    "quantize",
    "save",
    "split_learned",
    "verify",
]
