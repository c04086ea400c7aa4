"""The arguments of a function, split into traced arrays and static values."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import jax
import numpy as np
from flax.core.meta import AxisMetadata

# Path in a tree of dictionaries: of a parameter, or of a tensor's state.
Key = tuple[str, ...]

ArgumentKind = Literal["parameter", "variable", "input"]
_KINDS: tuple[ArgumentKind, ...] = ("parameter", "variable", "input")


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Return the array leaves of a tree, and a function that rebuilds the tree from them.

    All other leaves are static; parameters can have some, as the functions in an Equinox module.
    """
    leaves, structure = jax.tree.flatten(tree)

    def rebuild(arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        return jax.tree.unflatten(structure, [next(rest) if _is_array(x) else x for x in leaves])

    return [leaf for leaf in leaves if _is_array(leaf)], rebuild


def array_paths(tree: Any) -> list[tuple[Any, ...]]:
    """Return the paths of the arrays that `split_arrays` returns."""
    return [path for path, x in jax.tree_util.tree_flatten_with_path(tree)[0] if _is_array(x)]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A function's arguments, split into traced arrays and static values.

    Attributes:
        flat: The array leaves.
        names: Path of each array within the parameters, or within another collection of the
            model's variables; None for inputs. The boxes of Flax's metadata
            (`nn.with_partitioning`) and `nnx.Variable` add nothing to it.
        kinds: Whether each array is a parameter, another variable of the model, or an input.
        rebuild: Makes the arguments from the array leaves.
        static: What the arguments are beside the arrays: equal for equal structures and values.
    """

    flat: list[Any]
    names: list[Key | None]
    kinds: list[ArgumentKind]
    rebuild: Callable[[list[Any]], tuple[Any, ...]]
    static: Any

    @classmethod
    def of(cls, parameters: Any, collections: Any, inputs: Any) -> Self:
        """Split (parameters, other collections of variables, inputs)."""
        leaves, structure = jax.tree_util.tree_flatten_with_path((parameters, collections, inputs))
        arrays = [(path, leaf) for path, leaf in leaves if _is_array(leaf)]
        statics = [None if _is_array(leaf) else (leaf,) for _, leaf in leaves]

        def rebuild(flat: list[Any]) -> tuple[Any, ...]:
            rest = iter(flat)
            return jax.tree.unflatten(
                structure, [next(rest) if s is None else s[0] for s in statics]
            )

        names = [
            _name(_KINDS[path[0].idx], path)
            for path, leaf in _without_boxes((parameters, collections, inputs))
            if _is_array(leaf)
        ]
        kinds = [_KINDS[path[0].idx] for path, _ in arrays]
        # 1 and True and 1.0 are equal, and not the same argument.
        types = tuple(None if static is None else type(static[0]) for static in statics)
        static = (structure, tuple(statics), types)
        return cls([leaf for _, leaf in arrays], names, kinds, rebuild, static)


def _name(kind: ArgumentKind, path: tuple[Any, ...]) -> Key | None:
    if kind == "input":
        return None
    if kind == "parameter":
        return key_of(path[1:])
    name = key_of(path[2:])  # Without the collection.
    return name[:-1] if len(name) > 1 and name[-1] == "value" else name  # Of an `nnx.Variable`.


def _without_boxes(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Return the leaves of a tree in order; those of a box have the path of the box."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, AxisMetadata)
    )
    return [(path, leaf) for path, box in leaves for leaf in jax.tree.leaves(box)]


def key_of(path: tuple[Any, ...]) -> Key:
    """Return the names of a path in a tree, as `jax.tree_util` gives it."""
    return tuple(
        str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path
    ) or ("parameters",)
