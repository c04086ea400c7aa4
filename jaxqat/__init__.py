"""jaxqat: int8 quantization-aware training for JAX, by transforming a model's computation."""

from jaxqat.analysis import Analysis, analyze
from jaxqat.analysis._describe import Description, describe
from jaxqat.errors import (
    ArtifactError,
    ConversionError,
    ExecutionError,
    ExportError,
    GraphError,
    JaxqatError,
    QuantizationError,
    RecipeError,
)
from jaxqat.integer._convert.convert import convert
from jaxqat.integer._execute.executor import Executor, make_executor
from jaxqat.integer._store.folder import load, save
from jaxqat.integer._verify import Verification, verify
from jaxqat.integer.graph import IntegerGraph
from jaxqat.quant import (
    LayerInfo,
    QuantizedFunction,
    QuantizedModule,
    Recipe,
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
    "ExportError",
    "GraphError",
    "IntegerGraph",
    "JaxqatError",
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
