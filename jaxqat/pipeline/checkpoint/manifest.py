"""The manifest of a checkpoint: shape, dtype and SHA-256 of its arrays."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxqat.errors import RunError

MAX_NAMED = 10  # Arrays that an error names.


class CheckpointError(RunError):
    """A checkpoint is missing, does not fit, or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """The content of a checkpoint differs from what was saved."""


def manifest(tree: Any) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and SHA-256 of every array in a tree, by path."""
    return {
        path: {
            **_signature(leaf),
            "sha256": hashlib.sha256(np.ascontiguousarray(leaf).data).hexdigest(),
        }
        for path, leaf in _leaves(tree)
    }


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _signature(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def dictionary(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of nested dictionaries that a manifest describes, of shapes and types."""
    tree: dict[str, Any] = {}
    for path, array in saved.items():
        *parents, name = path.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = jax.ShapeDtypeStruct(tuple(array["shape"]), array["dtype"])
    return tree


def check_fits(where: Path, saved: Mapping[str, Any], name: str, target: Any) -> None:
    """Check that saved arrays have the names, shapes and dtypes that the caller expects.

    Orbax would cast a wrong dtype silently and report a wrong shape by an internal name.

    Args:
        where: The checkpoint, for the error message.
        saved: Its manifest of this part.
        name: Name of the part.
        target: The expected tree, of leaves with shape and dtype.

    Raises:
        CheckpointError: If not; names every array that differs, up to `MAX_NAMED`.
    """
    wanted = {path: _signature(leaf) for path, leaf in _leaves(target)}
    found = {path: {"shape": a["shape"], "dtype": a["dtype"]} for path, a in saved.items()}
    differing = [
        f"{name}/{path} is {_format(found.get(path))} there, expected {_format(wanted.get(path))}"
        for path in sorted(wanted.keys() | found.keys())
        if wanted.get(path) != found.get(path)
    ]
    if differing:
        more = f"; and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        raise CheckpointError(
            f"{where} is of another model: {'; '.join(differing[:MAX_NAMED])}{more}."
        )


def _format(signature: Mapping[str, Any] | None) -> str:
    if signature is None:
        return "absent"
    return f"{signature['dtype']}[{','.join(map(str, signature['shape']))}]"
