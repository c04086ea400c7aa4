"""Signal to quantization noise."""

from typing import Any

import numpy as np


def decibels(real: Any, values: Any) -> float:
    """Return 10 log10(sum(real**2) / sum((real - values)**2)), computed in float64."""
    real = np.asarray(real, np.float64)
    noise = real - np.asarray(values, np.float64)
    return float(10 * np.log10((real**2).sum() / (noise**2).sum()))
