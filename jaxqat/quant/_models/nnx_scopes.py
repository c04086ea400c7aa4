# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Names of NNX modules in a trace, as Linen's modules have them.

Linen runs each module under a `jax.named_scope` of its name; NNX does not, so an operation would
not tell to which module it belongs. NNX has no hook for calls either. A call is found on the class,
so each module of a private copy gets a subclass of its class that enters the scope.
"""

import contextvars
import functools
from typing import Any

import jax
from flax import nnx

Path = tuple[str, ...]

_here: contextvars.ContextVar[Path] = contextvars.ContextVar("path of the module", default=())


def name_calls(module: nnx.Module) -> None:
    """Run the calls of all modules inside of this one under the names of their paths.

    The module is changed: pass a copy.
    """
    for keys, inner in list(nnx.iter_modules(module)):
        path = tuple(map(str, keys))
        if path and "__call__" in {name for base in type(inner).__mro__ for name in vars(base)}:
            # Modules check what is assigned to them; a class is none of their attributes.
            object.__setattr__(inner, "__class__", _named(type(inner), path))


@functools.cache  # One class for each module: JAX keeps every class of modules that it has seen.
def _named(cls: Any, path: Path) -> Any:
    """Return a subclass whose calls run in the scope of a path."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = _here.get()
        inner = path[len(outer) :] if path[: len(outer)] == outer else path
        token = _here.set(path)
        try:
            with jax.named_scope("/".join(inner)):
                return cls.__call__(self, *args, **kwargs)
        finally:
            _here.reset(token)

    functools.update_wrapper(call, cls.__call__)
    own = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (cls,), own)
