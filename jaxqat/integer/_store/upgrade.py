"""Graphs of earlier formats, as today's."""

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
    nodes = content.get("nodes")
    if isinstance(nodes, list):
        rest["nodes"] = [_upgraded(node) for node in nodes]
    return {"inputs": [entry], **rest}


def _upgraded(node: Any) -> Any:
    kind = node.get("node") if isinstance(node, dict) else None
    if kind == "Quantize" and node.get("inputs") == []:
        return {**node, "inputs": [INPUT]}
    return {"axis": 0, "indices": [], **node} if kind == "Move" else node
