"""One graph, one result, and for each platform the operations that run as integers there."""

from jaxqat.integer.platforms.base import Platform
from jaxqat.integer.platforms.cpu import Cpu
from jaxqat.integer.platforms.cuda import Cuda, CudnnApproximate
from jaxqat.integer.platforms.pallas import PallasCuda

__all__ = ["Cpu", "Cuda", "CudnnApproximate", "PallasCuda", "Platform"]
