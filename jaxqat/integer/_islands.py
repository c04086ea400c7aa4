# pyright: strict
"""The float islands of a graph: connected float operations between its integer parts."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxqat.integer._nodes.base import Node
from jaxqat.integer._nodes.float_op import FloatOp


@dataclasses.dataclass(frozen=True)
class Island:
    """A float region of a network.

    Attributes:
        name: The innermost module that holds all its operations; '' for the whole model.
        operations: How often it has each operation.
        inputs: Names of the tensors that it reads.
        outputs: Names of its results that something else reads, or that the network returns.
    """

    name: str
    operations: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        counts = ", ".join(
            name if count == 1 else f"{count} {name}" for name, count in self.operations.items()
        )
        return f"{self.name or 'the model'}: {counts}"


def find_islands(nodes: Sequence[Node], results: Sequence[str]) -> tuple[Island, ...]:
    """Return the islands of a graph in the order of their first operation.

    Args:
        nodes: Nodes of the graph.
        results: Names of its results.
    """
    operations = [node for node in nodes if isinstance(node, FloatOp)]
    group = {node.output: node.output for node in operations}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for node in operations:
        for name in node.inputs:
            if name in group:
                group[root(node.output)] = root(name)
    members: dict[str, list[FloatOp]] = {}
    for node in operations:
        members.setdefault(root(node.output), []).append(node)
    return tuple(_island(part, nodes, results) for part in members.values())


def _island(part: list[FloatOp], nodes: Sequence[Node], results: Sequence[str]) -> Island:
    made = {node.output for node in part}
    read = [name for node in nodes if node.output not in made for name in node.inputs]
    outside = {*read, *results}
    return Island(
        name="/".join(_common([node.name.split("/")[:-1] for node in part])),
        operations=dict(Counter(node.operation for node in part)),
        inputs=tuple(dict.fromkeys(x for node in part for x in node.inputs if x not in made)),
        outputs=tuple(node.output for node in part if node.output in outside),
    )


def _common(paths: Iterable[list[str]]) -> list[str]:
    """Return the parts with which all paths begin."""
    first, *others = paths
    for path in others:
        pairs = enumerate(zip(first, path, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(first), len(path)))
        first = first[:same]
    return first
