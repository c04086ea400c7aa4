"""Ways to compile a training step on a CPU: XLA's, and the one of `jaxqat.jit_step`.

They differ in the order of float sums, and so in the last bits of the trained weights.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from jaxqat.quant._models.training_step import fast_on_cpu
from jaxqat.quant._numerics.cpu import OPTIONS


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A way to compile a training step.

    Attributes:
        name: Its name in configs and files.
        fast: Whether it is the one of `jaxqat.jit_step`.
    """

    name: str
    fast: bool

    def compile(self, dispatch: Callable[..., Any], *arguments: Any) -> Any:
        """Trace a jitted function for arguments, or their shapes, and compile it."""
        traced: Any = dispatch
        with fast_on_cpu() if self.fast else contextlib.nullcontext():
            lowered = traced.lower(*arguments)
        return lowered.compile(compiler_options=dict(OPTIONS) if self.fast else None)


# Those of `settings.training.COMPILATIONS`.
DEFAULT = Compilation("default", fast=False)
FAST = Compilation("fast", fast=True)
COMPILATIONS = {each.name: each for each in (DEFAULT, FAST)}
