"""Conversion of an integer graph to JSON text and arrays, and back.

`TypedJson` checks every field against its declared type. This module adds the types that plain JSON
lacks: a float32 in hexadecimal ('0x1.8p-5'), which is exact; an array as its name, dtype, shape
and SHA-256, where equal arrays have one name; a node as its class name and fields. A field with
`code_bits` in its metadata names the field that holds the width of its codes. Narrow codes are
packed (`_packing`): dtype, shape and SHA-256 stay those of the codes, and `packed` is the number of
bits per code. The decoded graph checks its invariants.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax import dtypes

from jaxqat.integer import graph as g
from jaxqat.integer._packing import pack, packed_size, stored_bits, unpack
from jaxqat.integer._store.typed_json import CodecError, Encoding, TypedJson, at, wrong
from jaxqat.integer._store.upgrade import from_format_5, from_format_6

FORMAT = 7
_UPGRADES = {5: from_format_5, 6: from_format_6}

_MAX_ITEM = 16  # Bytes of the largest number.
_ARRAY_KEYS = {"array", "dtype", "shape", "sha256"}
_EXTENDED = {"bfloat16": np.dtype(dtypes.bfloat16)}  # Two bytes each.
_CLASSES = {kind.__name__: kind for kind in g.NODE_KINDS}


def encode(graph: g.IntegerGraph) -> tuple[str, dict[str, np.ndarray]]:
    """Return a graph as JSON text and the arrays that the text refers to.

    Raises:
        CodecError: If a field is not of its declared type, or the metadata has no JSON form.
    """
    codec = _GraphCodec({})
    content = {"format": FORMAT, **codec.json.encode_fields(graph, "")}
    _share_equal(content["nodes"], codec.arrays)
    return json.dumps(content, indent=1, allow_nan=False) + "\n", codec.arrays


def decode(text: str, arrays: Mapping[str, np.ndarray]) -> g.IntegerGraph:
    """Return the graph that `encode` converted to this text and these arrays.

    Raises:
        CodecError: If a field is unknown, missing or of another type; names the field, the expected
            type and the value.
        GraphError: If the graph breaks an invariant of `IntegerGraph`.
    """
    return decode_content(parse(text), arrays)


def parse(text: str) -> dict[str, Any]:
    """Return the fields of a graph as JSON values, after a check of the format's version.

    Raises:
        CodecError: If the text is not JSON, or of another version.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"is not JSON: {error}.") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CodecError("has no 'format'.")
    version = content.pop("format")
    if type(version) is int and version in _UPGRADES:
        return _UPGRADES[version](content)
    if type(version) is not int or version != FORMAT:
        known = ", ".join(map(str, (*_UPGRADES, FORMAT)))
        raise CodecError(f"format is {version!r}; this version of jaxqat reads {known}.")
    return content


def stored_sizes(content: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of each array that the nodes declare, by name, as they are stored."""
    sizes: dict[str, int] = {}
    for value in _declared(content.get("nodes")):
        shape, width = value["shape"], value.get("packed")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
            shape = [0]  # `decode_content` names the field.
        is_packed = width in (2, 4)
        size = packed_size(math.prod(shape), width) if is_packed else math.prod(shape) * _MAX_ITEM
        sizes[str(value["array"])] = size
    return sizes


def _share_equal(nodes: Any, arrays: dict[str, np.ndarray]) -> None:
    """Let equal arrays be stored once: a layer of a loop has its weights in each iteration."""
    first: dict[str, str] = {}
    for value in _declared(nodes):
        key = json.dumps([value["sha256"], value["dtype"], value["shape"], value.get("packed")])
        name = first.setdefault(key, value["array"])
        if name != value["array"]:
            del arrays[value["array"]]
            value["array"] = name


def _declared(nodes: Any) -> Iterator[dict[str, Any]]:
    """Yield what describes an array: a field of a node, or an entry of a list in one."""
    for node in nodes if isinstance(nodes, list) else []:
        for field in node.values() if isinstance(node, dict) else []:
            for value in field if isinstance(field, list) else [field]:
                if isinstance(value, dict) and value.keys() - {"packed"} == _ARRAY_KEYS:
                    yield value


def decode_content(content: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> g.IntegerGraph:
    """Return the graph of fields that `parse` returned.

    Raises:
        CodecError: As `decode`.
        GraphError: If the graph breaks an invariant of `IntegerGraph`.
    """
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
        described = {"array": name, "dtype": array.dtype.name, "shape": list(array.shape)}
        return {**described, "sha256": _sha256(array)}

    @staticmethod
    def _typed(array: np.ndarray, dtype: Any) -> np.ndarray:
        """Return an array of a type that NumPy's files do not know, such as bfloat16, as such."""
        is_raw = array.dtype.kind == "V" and dtype in _EXTENDED
        return array.view(_EXTENDED[dtype]) if is_raw and array.dtype.itemsize == 2 else array

    def _decode_array(self, value: Any, key: str) -> np.ndarray:
        if not isinstance(value, dict) or value.keys() - {"packed"} != _ARRAY_KEYS:
            raise wrong(key, value, "an object with array, dtype, shape and sha256")
        array = self.arrays.get(value["array"]) if isinstance(value["array"], str) else None
        if array is None:
            raise CodecError(f"{key}: there is no array {value['array']!r}.")
        if "packed" in value:
            array = _unpack(array, value, key)
        array = self._typed(array, value["dtype"] if isinstance(value["dtype"], str) else None)
        if [array.dtype.name, list(array.shape)] != [value["dtype"], value["shape"]]:
            raise CodecError(
                f"{key}: the array must be {value['dtype']}{value['shape']}, "
                f"got {array.dtype.name}{list(array.shape)}."
            )
        if value["sha256"] != _sha256(array):
            raise CodecError(f"{key}: the array {value['array']!r} is not the one that was saved.")
        return array


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


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
