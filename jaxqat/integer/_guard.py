# pyright: strict
"""The check of an integer network that a caller passes."""

from typing import Any

from jaxqat.errors import InputError
from jaxqat.integer.graph import IntegerGraph


def check_graph(graph: Any, caller: str, *, error: type[InputError]) -> None:
    """Refuse what is no integer network, such as the model that it is made from.

    Raises:
        error: Names the caller and the type.
    """
    if not isinstance(graph, IntegerGraph):
        raise error(
            f"{caller} needs the IntegerGraph that `jaxqat.convert` returned, got "
            f"{type(graph).__name__}."
        )
