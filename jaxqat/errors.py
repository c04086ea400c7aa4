# pyright: strict
"""The errors that jaxqat raises on purpose; all of them are `JaxqatError`.

A message names the setting, file or layer, says what was found there, and what would be right.
"""

from collections.abc import Sequence


class JaxqatError(Exception):
    """Base of every error of this library."""


class InputError(JaxqatError, ValueError):
    """Something that was passed in cannot be used; the command exits with status 2."""


class RunError(JaxqatError, RuntimeError):
    """Work on valid input failed; the command exits with status 1."""


class MissingPackageError(RunError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class RecipeError(InputError):
    """A recipe, or one of its rules, cannot be applied."""


class QuantizationError(InputError):
    """A computation cannot be quantized as asked."""


class ConversionError(InputError):
    """A model cannot become an integer network; the message names every place and the reason.

    Attributes:
        reasons: One line for each part of the model that has no integer form; empty if the reason
            lies elsewhere.
    """

    def __init__(self, message: str, reasons: Sequence[str] = ()):
        super().__init__(message)
        self.reasons = tuple(reasons)


class GraphError(InputError):
    """An integer graph breaks an invariant; the message names the node and the tensor."""


class ExecutionError(InputError):
    """An integer network cannot be executed as asked."""


class ArtifactError(InputError):
    """A saved network cannot be read, or not be written as asked; the message names the file."""


class ExportError(InputError):
    """A network cannot be exported as asked; the message names the node or the path, and why."""
