"""Conversion of an integer graph to JSON text and arrays, and back.

`TypedJson` checks every field against its declared type. This module adds the types that plain JSON
lacks: a float32 in hexadecimal ('0x1.8p-5'), which is exact; an array as its name, dtype and shape;
a node as its class name and fields. A field with `code_bits` in its metadata names the field that
holds the width of its codes. Narrow codes are packed (`_packing`): dtype and shape stay those of
the codes, and `packed` is the number of bits per code. The decoded graph checks its invariants.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxqat.integer import graph as g
from jaxqat.integer._packing import pack, stored_bits, unpack
from jaxqat.integer._store.typed_json import CodecError, Encoding, TypedJson, at, wrong

FORMAT = 5

_CLASSES = {kind.__name__: kind for kind in g.NODE_KINDS}


def encode(graph: g.IntegerGraph) -> tuple[str, dict[str, np.ndarray]]:
    """Return a graph as JSON text and the arrays that the text refers to.

    Raises:
        CodecError: If a field is not of its declared type, or the metadata has no JSON form.
    """
    codec = _GraphCodec({})
    content = {"format": FORMAT, **codec.json.encode_fields(graph, "")}
    return json.dumps(content, indent=1, allow_nan=False) + "\n", codec.arrays


def decode(text: str, arrays: Mapping[str, np.ndarray]) -> g.IntegerGraph:
    """Return the graph that `encode` converted to this text and these arrays.

    Raises:
        CodecError: If a field is unknown, missing or of another type; names the field, the expected
            type and the value.
        GraphError: If the graph breaks an invariant of `IntegerGraph`.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CodecError(f"is not JSON: {error}.") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CodecError("has no 'format'.")
    version = content.pop("format")
    if type(version) is not int or version != FORMAT:
        raise CodecError(f"format is {version!r}; this version of jaxqat reads {FORMAT}.")
    codec = _GraphCodec(dict(arrays))
    return g.IntegerGraph(**codec.json.decode_fields(content, g.IntegerGraph, ""))


class _GraphCodec:
    """Encode and decode the parts of a graph that plain JSON lacks.

    Attributes:
        arrays: Arrays by name: those encoded so far, or all that decoding can refer to.
        json: `TypedJson` with the encodings of this class.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.json = TypedJson(
            encodings={
                np.float32: Encoding(_encode_float32, _decode_float32),
                np.ndarray: Encoding(self._encode_array, self._decode_array),
                dict[str, g.Tensor]: Encoding(self._encode_tensors, self._decode_tensors),
                g.Node: Encoding(self._encode_node, self._decode_node),
            }
        )

    def _encode_tensors(self, tensors: dict[str, g.Tensor], key: str) -> list[Any]:
        for name, tensor in tensors.items():
            if name != tensor.name:
                raise CodecError(f"{key}: the tensor under {name!r} has the name {tensor.name!r}.")
        return [self.json.encode(t, g.Tensor, at(key, name)) for name, t in tensors.items()]

    def _decode_tensors(self, value: Any, key: str) -> dict[str, g.Tensor]:
        if not isinstance(value, list):
            raise wrong(key, value, "a list of tensors")
        tensors: dict[str, g.Tensor] = {}
        for i, content in enumerate(value):
            tensor = self.json.decode(content, g.Tensor, f"{key}[{i}]")
            if tensor.name in tensors:
                raise CodecError(f"{key}[{i}]: the name {tensor.name!r} occurs twice.")
            tensors[tensor.name] = tensor
        return tensors

    def _encode_node(self, node: g.Node, key: str) -> dict[str, Any]:
        if type(node) not in g.NODE_KINDS:
            raise CodecError(f"{key}: {type(node).__name__} is not a known node kind.")
        # Arrays are named by layer, not by index, which depends on the rest of the graph.
        fields = self.json.encode_fields(node, f"{key.partition('[')[0]}.{node.name}")
        for name, bits in _code_bits(node):
            if (width := stored_bits(bits)) < 8:
                array = fields[name]["array"]
                self.arrays[array] = pack(self.arrays[array], bits)
                fields[name]["packed"] = width
        return {"node": type(node).__name__, **fields}

    def _decode_node(self, value: Any, key: str) -> g.Node:
        if not isinstance(value, dict) or not isinstance(value.get("node"), str):
            raise wrong(key, value, "an object with 'node', a node kind")
        kind = value["node"]
        if kind not in _CLASSES:
            raise CodecError(f"{key}.node must be one of {', '.join(_CLASSES)}, got {kind!r}.")
        content = {name: field for name, field in value.items() if name != "node"}
        node = _CLASSES[kind](**self.json.decode_fields(content, _CLASSES[kind], key))
        for name, bits in _code_bits(node):
            _check_packed(content[name], bits, at(key, name))
        return node

    def _encode_array(self, array: Any, key: str) -> dict[str, Any]:
        if type(array) is not np.ndarray or array.dtype.hasobject:
            raise wrong(key, array, "a NumPy array of numbers")
        self.arrays[name := f"{len(self.arrays)}:{key}"] = array
        return {"array": name, "dtype": array.dtype.name, "shape": list(array.shape)}

    def _decode_array(self, value: Any, key: str) -> np.ndarray:
        if not isinstance(value, dict) or value.keys() - {"packed"} != {"array", "dtype", "shape"}:
            raise wrong(key, value, "an object with array, dtype and shape")
        array = self.arrays.get(value["array"]) if isinstance(value["array"], str) else None
        if array is None:
            raise CodecError(f"{key}: there is no array {value['array']!r}.")
        if "packed" in value:
            array = _unpack(array, value, key)
        if [array.dtype.name, list(array.shape)] != [value["dtype"], value["shape"]]:
            raise CodecError(
                f"{key}: the array must be {value['dtype']}{value['shape']}, "
                f"got {array.dtype.name}{list(array.shape)}."
            )
        return array


def _code_bits(node: g.Node) -> list[tuple[str, int]]:
    """Return the fields of a node that hold codes, each with the width of its codes."""
    return [
        (field.name, getattr(node, field.metadata["code_bits"]))
        for field in dataclasses.fields(node)
        if "code_bits" in field.metadata
    ]


def _check_packed(content: Mapping[str, Any], bits: int, key: str) -> None:
    width = stored_bits(bits)
    if content.get("packed", 8) != width:
        expected = f"packed to {width} bits each" if width < 8 else "one byte each"
        raise CodecError(f"{key}: codes of weight_bits {bits} must be {expected}.")


def _unpack(packed: np.ndarray, value: dict[str, Any], key: str) -> np.ndarray:
    bits, shape = value["packed"], value["shape"]
    if type(bits) is not int or bits not in (2, 4):
        raise wrong(f"{key}.packed", bits, "2 or 4")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise wrong(f"{key}.shape", shape, "a list of sizes")
    try:
        return unpack(packed, tuple(shape), bits)
    except ValueError as error:
        raise CodecError(f"{key}: {error}") from error


def _encode_float32(value: Any, key: str) -> str:
    if type(value) is not np.float32:
        raise wrong(key, value, "float32")
    return float(value).hex()


def _decode_float32(value: Any, key: str) -> np.float32:
    try:
        number = float.fromhex(value)
        with np.errstate(over="ignore"):
            rounded = np.float32(number)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong(key, value, "a float32 in hexadecimal") from error
    if float(rounded) != number:
        raise wrong(key, value, "a float32 in hexadecimal")
    return rounded
