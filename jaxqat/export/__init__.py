"""Export of the integer network to the formats of other runtimes.

    from jaxqat.export import export_onnx, export_stablehlo, load_stablehlo, load_onnx, run_onnx

Importing this package imports neither `onnx` nor `onnxruntime`: each name loads its module on first
use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxqat.export._certificate import export_certificate
    from jaxqat.export._onnx.model import export_onnx
    from jaxqat.export._onnx.runtime import load_onnx, run_onnx
    from jaxqat.export._stablehlo import export_stablehlo, load_stablehlo

__all__ = [
    "export_certificate",
    "export_onnx",
    "export_stablehlo",
    "load_onnx",
    "load_stablehlo",
    "run_onnx",
]

_MODULES = {
    "export_certificate": "jaxqat.export._certificate",
    "export_onnx": "jaxqat.export._onnx.model",
    "export_stablehlo": "jaxqat.export._stablehlo",
    "load_onnx": "jaxqat.export._onnx.runtime",
    "load_stablehlo": "jaxqat.export._stablehlo",
    "run_onnx": "jaxqat.export._onnx.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
