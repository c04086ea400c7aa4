"""jaxqat: int8 quantization-aware training for JAX, by transforming a model's computation."""

from jaxqat.analysis import Analysis, analyze
from jaxqat.analysis._describe import Description, describe
from jaxqat.integer._convert.convert import ConversionError, convert
from jaxqat.integer._execute.executor import ExecutionError, Executor, make_executor
from jaxqat.integer._store.folder import ArtifactError, load, save
from jaxqat.integer._verify import Verification, verify
from jaxqat.integer.graph import GraphError, IntegerGraph
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
