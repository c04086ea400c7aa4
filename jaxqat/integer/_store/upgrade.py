"""Graphs of earlier formats, as today's."""

from collections.abc import Callable
from typing import Any

from jaxqat.integer._inputs import INPUT


def from_format_5(content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a graph of format 5: of one input, which a node reads without its name.

    Args:
        content: Its fields, as JSON values that are not checked yet.
    """
    rest = {key: content[key] for key in content if key not in ("input_shape", "input_type")}
    entry = {"type": content.get("input_type", "float32"), "path": [0]}
    if "input_shape" in content:
        entry["shape"] = content["input_shape"]
    return from_format_6({"inputs": [entry], **_with_nodes(rest, _of_format_6)})


def from_format_6(content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a graph of format 6, whose inputs are not scaled by the network.

    Args:
        content: Its fields, as JSON values that are not checked yet.
    """
    return _with_nodes(content, _of_format_7)


def _with_nodes(content: dict[str, Any], upgraded: Callable[[Any], Any]) -> dict[str, Any]:
    nodes = content.get("nodes")
    return {**content, "nodes": [*map(upgraded, nodes)]} if isinstance(nodes, list) else content


def _of_format_6(node: Any) -> Any:
    if _kind(node) == "Quantize" and node.get("inputs") == []:
        return {**node, "inputs": [INPUT]}
    return {"axis": 0, "indices": [], **node} if _kind(node) == "Move" else node


def _of_format_7(node: Any) -> Any:
    unscaled = dict.fromkeys(("shifts", "factors", "terms"))
    return {**unscaled, **node} if _kind(node) == "Quantize" else node


def _kind(node: Any) -> Any:
    return node.get("node") if isinstance(node, dict) else None
