"""Execution of integer graphs: one result, and for each platform its fast integer operations."""

from jaxqat.integer._execute.base import Platform
from jaxqat.integer._execute.cpu import Cpu
from jaxqat.integer._execute.cuda import Cuda
from jaxqat.integer._execute.pallas import PallasCuda

__all__ = ["Cpu", "Cuda", "PallasCuda", "Platform"]
