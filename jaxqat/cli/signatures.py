"""The signature of each command, read from its source: help and wrong options import no JAX.

A command is the function of the same name in a module of `jaxqat.commands`. Its parameters give the
options, their types and defaults, its docstring the help. The module is imported when it is called.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

import jaxqat.commands
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.settings.data import SplitName

COMMANDS = (
    *("train", "quantize", "evaluate", "analyze", "verify", "export", "benchmark", "lowering"),
    *("report", "predict", "runs", "compare", "doctor"),
)
# What annotations of parameters are made of.
_NAMES = {
    "Console": Console,
    "Experiment": Experiment,
    "Literal": Literal,
    "Path": Path,
    "Sequence": Sequence,
    "SplitName": SplitName,
}


@dataclasses.dataclass(frozen=True)
class Signature:
    """A command's parameters and documentation.

    Attributes:
        hints: Type of each parameter, in order.
        defaults: Default values; parameters without one are required.
        doc: The docstring.
    """

    hints: Mapping[str, Any]
    defaults: Mapping[str, Any]
    doc: str


@functools.cache
def signature(name: str) -> Signature:
    """Return the signature of a command."""
    path = Path(jaxqat.commands.__path__[0]) / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args]
    values: list[ast.expr | None] = [None] * (len(given) - len(arguments.defaults))
    pairs = [
        *zip(given, [*values, *arguments.defaults], strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    texts = {a.arg: ast.unparse(a.annotation) for a, _ in pairs if a.annotation is not None}
    hints = typing.get_type_hints(types.SimpleNamespace(__annotations__=texts), globalns=_NAMES)
    defaults = {a.arg: ast.literal_eval(value) for a, value in pairs if value is not None}
    return Signature(hints, defaults, inspect.cleandoc(ast.get_docstring(function) or ""))


def load_command(name: str) -> Callable[..., Any]:
    """Import a command's module and return its function."""
    return getattr(importlib.import_module(f"jaxqat.commands.{name}"), name)
