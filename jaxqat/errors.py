# pyright: strict
"""The errors that jaxqat raises on purpose; all of them are `JaxqatError`.

A message names the setting, file or layer, says what was found there, and what would be right.
"""

import importlib.metadata
import json
import re
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class JaxqatError(Exception):
    """Base of every error of this library."""


class InputError(JaxqatError, ValueError):
    """Something that was passed in cannot be used; the command exits with status 2."""


class RunError(JaxqatError, RuntimeError):
    """Work on valid input failed; the command exits with status 1."""


class Stopped(JaxqatError):
    """A signal stopped the work; its state was saved.

    Attributes:
        signum: Number of the signal; the exit status should be 128 + signum.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class MissingPackageError(RunError, ImportError):
    """An optional package is not installed; the message says how to install it.

    The command `pip install 'jaxqat[EXTRAS]'` in a message becomes the one that works for the
    source that jaxqat was installed from (`install_command`).
    """

    def __init__(self, message: str):
        super().__init__(
            re.sub(r"pip install 'jaxqat\[(.*?)\]'", lambda m: install_command(m[1]), message)
        )


def install_command(extras: str) -> str:
    """Return the command that adds extras to the present installation, such as 'onnx,openvino'.

    A checkout that the package runs from is named by its path; otherwise pip's record of the source
    decides (`direct_url.json`, PEP 610): a folder, a repository or an archive. Without a record the
    package came from an index.
    """
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{checkout}[{extras}]')}"
    source = _recorded_source()
    url = str(source.get("url", ""))
    if "dir_info" in source and url.startswith("file://"):
        folder = unquote(urlsplit(url).path)
        return f"pip install {shlex.quote(f'{folder}[{extras}]')}"
    if "vcs_info" in source:
        vcs: dict[str, str] = source["vcs_info"]
        revision = vcs.get("requested_revision") or vcs["commit_id"]
        url = f"{vcs['vcs']}+{url}@{revision}"
    at = f" @ {url}" if url else ""
    return f"pip install {shlex.quote(f'jaxqat[{extras}]{at}')}"


def _recorded_source() -> dict[str, Any]:
    """Return pip's record of where the package came from; empty if there is none."""
    try:
        text = importlib.metadata.distribution("jaxqat").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return {}
    return json.loads(text) if text else {}


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
