# pyright: strict
"""jaxqat: int8 quantization-aware training for JAX, by transforming a model's computation."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxqat.analysis import Analysis, analyze
from jaxqat.analysis._describe import Description, describe
from jaxqat.errors import (
    ArtifactError,
    ConversionError,
    ExecutionError,
    ExportError,
    GraphError,
    JaxqatError,
    MissingPackageError,
    QuantizationError,
    RecipeError,
)
from jaxqat.integer._compare import Verification
from jaxqat.integer._convert.convert import convert
from jaxqat.integer._execute.executor import Executor, make_executor
from jaxqat.integer._store.folder import load, save
from jaxqat.integer._verify import verify
from jaxqat.integer.graph import IntegerGraph
from jaxqat.quant import (
    BatchNormWarning,
    BoundModel,
    LayerInfo,
    QuantizedModel,
    Recipe,
    Rule,
    StepWarning,
    aqt,
    calibrate,
    jit_step,
    quantize,
    reestimate_batch_norm,
)

if TYPE_CHECKING:
    from jaxqat.export._onnx.model import export_onnx
    from jaxqat.export._stablehlo import export_stablehlo, load_stablehlo

__version__ = "0.1.0"

# Loaded at first use: `onnx` is an optional dependency, and `jax.export` takes time to import.
_LAZY = {
    "export_onnx": "jaxqat.export._onnx.model",
    "export_stablehlo": "jaxqat.export._stablehlo",
    "load_stablehlo": "jaxqat.export._stablehlo",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxqat' has no attribute {name!r}")


__all__ = [
    "Analysis",
    "ArtifactError",
    "BatchNormWarning",
    "BoundModel",
    "ConversionError",
    "Description",
    "ExecutionError",
    "Executor",
    "ExportError",
    "GraphError",
    "IntegerGraph",
    "JaxqatError",
    "LayerInfo",
    "MissingPackageError",
    "QuantizationError",
    "QuantizedModel",
    "Recipe",
    "RecipeError",
    "Rule",
    "StepWarning",
    "Verification",
    "__version__",
    "analyze",
    "aqt",
    "calibrate",
    "convert",
    "describe",
    "export_onnx",
    "export_stablehlo",
    "jit_step",
    "load",
    "load_stablehlo",
    "make_executor",
    "quantize",
    "reestimate_batch_norm",
    "save",
    "verify",
]
