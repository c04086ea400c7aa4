"""Reading settings from YAML, within bounds.

A few lines of YAML can stand for gigabytes: each list repeats the one before it ten times, by
aliases. Size, depth and the number of values, aliases written out, are bounded here. A key that
occurs twice is an error, and errors name the dotted key.
"""

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import yaml

MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_VALUES = 10_000


class SettingsError(yaml.YAMLError):
    """YAML that cannot be read as settings; the message names the key or the line."""


def parse(text: str) -> Any:
    """Return the value of a YAML document of plain values.

    Raises:
        SettingsError: If it is not YAML, has an object of Python or a key twice, or exceeds a
            bound.
    """
    if len(text) > MAX_BYTES:
        raise SettingsError(f"has {len(text):,} characters, more than {MAX_BYTES:,}.")
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except SettingsError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"is not YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with bounds and dotted keys."""

    def __init__(self, text: str):
        super().__init__(text)
        self._path: list[str] = []
        self._keys: dict[int, str] = {}  # Dotted key of each node, by its id.
        self._sizes: dict[int, int] = {}  # Number of values of each finished node.

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node below a key or an index; check depth and size."""
        name = index.value if isinstance(index, yaml.ScalarNode) else index
        self._path.append("" if parent is None or name is None else str(name))
        if len(self._path) > MAX_DEPTH:
            raise SettingsError(f"{self._dotted()}: is nested more than {MAX_DEPTH} deep.")
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)  # pyright: ignore[reportArgumentType]
        if node is not None:
            self._check_size(node, alias)
        self._path.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping; refuse a key that occurs twice."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise SettingsError(f"{self._dotted(key.value)}: occurs twice.")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Hashable:
        """Return the value of a node; name its key if it has none."""
        with self._named(node):
            return super().construct_object(node, deep=deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the value of a mapping; name its key if it has none."""
        with self._named(node):
            return super().construct_mapping(node, deep=deep)

    @contextlib.contextmanager
    def _named(self, node: yaml.Node) -> Iterator[None]:
        try:
            yield
        except SettingsError:
            raise
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            problem = getattr(error, "problem", None) or error
            key = self._keys.get(id(node), "")
            raise SettingsError(f"{key}: cannot be read: {problem}.") from error

    def _check_size(self, node: yaml.Node, alias: bool) -> None:
        self._keys.setdefault(id(node), self._dotted())
        if alias and id(node) not in self._sizes:
            raise SettingsError(f"{self._dotted()}: refers to a part that it is in.")
        if not alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in _parts(node))
        if self._sizes[id(node)] > MAX_VALUES:
            raise SettingsError(f"{self._dotted()}: stands for more than {MAX_VALUES:,} values.")

    def _dotted(self, *more: str) -> str:
        return ".".join(filter(None, (*self._path, *more)))


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
