# pyright: strict
"""jaxqat: int8 quantization-aware training for JAX, by transforming a model's computation."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from jaxqat.export._onnx.model import export_onnx
    from jaxqat.export._stablehlo import export_stablehlo, load_stablehlo
    from jaxqat.integer._compare import Verification
    from jaxqat.integer._convert.convert import convert
    from jaxqat.integer._execute.executor import Executor, make_executor
    from jaxqat.integer._store.folder import load, save
    from jaxqat.integer._verify import verify
    from jaxqat.integer.graph import IntegerGraph
    from jaxqat.pipeline.load_run import load_run
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

__version__ = "0.1.0"

# The module of each name, loaded at first use: so the command can watch for Ctrl-C before it
# imports JAX, `onnx` stays optional, and `import jaxqat` takes no time.
_HOMES = {
    "Analysis": "jaxqat.analysis",
    "ArtifactError": "jaxqat.errors",
    "BatchNormWarning": "jaxqat.quant",
    "BoundModel": "jaxqat.quant",
    "ConversionError": "jaxqat.errors",
    "Description": "jaxqat.analysis._describe",
    "ExecutionError": "jaxqat.errors",
    "Executor": "jaxqat.integer._execute.executor",
    "ExportError": "jaxqat.errors",
    "GraphError": "jaxqat.errors",
    "IntegerGraph": "jaxqat.integer.graph",
    "JaxqatError": "jaxqat.errors",
    "LayerInfo": "jaxqat.quant",
    "MissingPackageError": "jaxqat.errors",
    "QuantizationError": "jaxqat.errors",
    "QuantizedModel": "jaxqat.quant",
    "Recipe": "jaxqat.quant",
    "RecipeError": "jaxqat.errors",
    "Rule": "jaxqat.quant",
    "StepWarning": "jaxqat.quant",
    "Verification": "jaxqat.integer._compare",
    "analyze": "jaxqat.analysis",
    "calibrate": "jaxqat.quant",
    "convert": "jaxqat.integer._convert.convert",
    "describe": "jaxqat.analysis._describe",
    "export_onnx": "jaxqat.export._onnx.model",
    "export_stablehlo": "jaxqat.export._stablehlo",
    "jit_step": "jaxqat.quant",
    "load": "jaxqat.integer._store.folder",
    "load_run": "jaxqat.pipeline.load_run",
    "load_stablehlo": "jaxqat.export._stablehlo",
    "make_executor": "jaxqat.integer._execute.executor",
    "quantize": "jaxqat.quant",
    "reestimate_batch_norm": "jaxqat.quant",
    "save": "jaxqat.integer._store.folder",
    "verify": "jaxqat.integer._verify",
}
_MODULES = {"aqt": "quant.aqt", "analysis": "analysis", "integer": "integer", "quant": "quant"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"jaxqat.{_MODULES[name]}")
    else:
        raise AttributeError(f"module 'jaxqat' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


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
    "load_run",
    "load_stablehlo",
    "make_executor",
    "quantize",
    "reestimate_batch_norm",
    "save",
    "verify",
]
