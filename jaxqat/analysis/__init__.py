# pyright: strict
"""Find where a quantized network loses accuracy: noise, clipping and sensitivity by layer."""

from jaxqat.analysis._analyze import analyze
from jaxqat.analysis.result import Analysis

__all__ = ["Analysis", "analyze"]
