"""An integer graph as JSON text and arrays, and back: every field checked against its declaration.

A float32 scalar is written in hexadecimal ('0x1.8p-5'), which is exact; an array by its name among
the arrays, with its dtype and shape. Weights of 2 to 4 bits are packed (`packing`): dtype and shape
are the codes', and `packed` says how many bits each takes in the array. What is read must have
exactly the fields that the data model declares, with values of the declared types; then the graph
checks its own invariants. Format 1, of before `weight_bits`, has no packed weights.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxqat.errors import InputError
from jaxqat.integer import graph as g
from jaxqat.integer._packing import pack, stored_bits, unpack

FORMAT = 2
NODES = (g.Quantize, g.Product, g.Add, g.MaxPool, g.SumPool, g.Move, g.Concat)

_CLASSES = {cls.__name__: cls for cls in NODES}
_PLAIN = {str: "a text", int: "a whole number", bool: "true or false"}


class CodecError(InputError):
    """What was met is not what the data model declares; the message names the field."""


def encode(graph: g.IntegerGraph) -> tuple[str, dict[str, np.ndarray]]:
    """The graph as JSON text and the arrays that it refers to.

    Raises:
        CodecError: A field does not hold what it declares, or the metadata has no JSON form.
    """
    arrays: dict[str, np.ndarray] = {}
    content = {"format": FORMAT, **_encode_fields(graph, "", arrays)}
    return json.dumps(content, indent=1, allow_nan=False) + "\n", arrays


def decode(text: str, arrays: Mapping[str, np.ndarray]) -> g.IntegerGraph:
    """The graph of what `encode` made.

    Raises:
        CodecError: If it is none: names the field, what it holds and what would be right.
        GraphError: If the graph breaks an invariant of `IntegerGraph`.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CodecError(f"is not JSON: {error}.") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CodecError("holds no 'format'.")
    version = content.pop("format")
    if version not in (1, FORMAT) or isinstance(version, bool):
        raise CodecError(f"format is {version!r}; this version of jaxqat reads 1 and {FORMAT}.")
    if version == 1:
        _to_format_2(content)
    fields = _decode_fields(g.IntegerGraph, content, "", arrays)
    return g.IntegerGraph(**fields)


def _to_format_2(content: dict[str, Any]) -> None:
    nodes = content.get("nodes")
    for node in nodes if isinstance(nodes, list) else ():
        if isinstance(node, dict) and node.get("node") == g.Product.__name__:
            node.setdefault("weight_bits", 8)


def _encode_fields(value: Any, where: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    hints = typing.get_type_hints(type(value))
    return {
        field.name: _encode(
            getattr(value, field.name), hints[field.name], _at(where, field.name), arrays
        )
        for field in dataclasses.fields(value)
    }


def _decode_fields(
    cls: type, content: Any, where: str, arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(content, dict):
        raise _wrong(where, content, f"the fields of {cls.__name__}")
    for name in content:
        if name not in names:
            raise CodecError(f"{_at(where, name)}: {cls.__name__} has no such field.")
    for name in names:
        if name not in content:
            raise CodecError(f"{_at(where, name)}: is missing.")
    return {name: _decode(content[name], hints[name], _at(where, name), arrays) for name in names}


def _encode(value: Any, hint: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    if hint == dict[str, object]:
        return _plain_json(value, where)
    if hint == dict[str, g.Tensor]:
        for key, tensor in value.items():
            if key != tensor.name:
                raise CodecError(f"{where}: the tensor under {key!r} is called {tensor.name!r}.")
        return [_encode_fields(tensor, f"{where}.{key}", arrays) for key, tensor in value.items()]
    if hint == tuple[g.Node, ...]:
        return [_encode_node(node, _at(where, node.name), arrays) for node in value]
    if isinstance(hint, types.UnionType):
        return None if value is None else _encode(value, _not_none(hint), where, arrays)
    if typing.get_origin(hint) is tuple:
        items = _items(hint, value, where)
        return [_encode(v, h, f"{where}[{i}]", arrays) for i, (v, h) in enumerate(items)]
    if hint is np.ndarray and type(value) is np.ndarray and not value.dtype.hasobject:
        arrays[name := f"{len(arrays)}:{where}"] = value
        return {"array": name, "dtype": value.dtype.name, "shape": list(value.shape)}
    if hint is np.float32 and type(value) is hint:
        return float(value).hex()
    _check_plain(value, hint, where)
    return value


def _encode_node(node: g.Node, where: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if type(node) not in NODES:
        raise CodecError(f"{where}: {type(node).__name__} is no node of the data model.")
    fields = _encode_fields(node, where, arrays)
    if isinstance(node, g.Product) and stored_bits(node.weight_bits) < 8:
        name = fields["weights"]["array"]
        arrays[name] = pack(arrays[name], node.weight_bits)
        fields["weights"]["packed"] = stored_bits(node.weight_bits)
    return {"node": type(node).__name__, **fields}


def _decode(value: Any, hint: Any, where: str, arrays: Mapping[str, np.ndarray]) -> Any:
    if hint == dict[str, object]:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return value
    if hint == dict[str, g.Tensor]:
        return _decode_tensors(value, where, arrays)
    if hint == tuple[g.Node, ...]:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list of nodes")
        return tuple(_decode_node(v, f"{where}[{i}]", arrays) for i, v in enumerate(value))
    if isinstance(hint, types.UnionType):
        return None if value is None else _decode(value, _not_none(hint), where, arrays)
    if typing.get_origin(hint) is tuple:
        items = _items(hint, value, where, container=list)
        return tuple(_decode(v, h, f"{where}[{i}]", arrays) for i, (v, h) in enumerate(items))
    if hint is np.ndarray:
        return _decode_array(value, where, arrays)
    if hint is np.float32:
        return _decode_float32(value, where)
    _check_plain(value, hint, where)
    return value


def _decode_tensors(
    value: Any, where: str, arrays: Mapping[str, np.ndarray]
) -> dict[str, g.Tensor]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list of tensors")
    tensors: dict[str, g.Tensor] = {}
    for i, fields in enumerate(value):
        tensor = g.Tensor(**_decode_fields(g.Tensor, fields, f"{where}[{i}]", arrays))
        if tensor.name in tensors:
            raise CodecError(f"{where}[{i}]: {tensor.name!r} stands twice.")
        tensors[tensor.name] = tensor
    return tensors


def _decode_node(value: Any, where: str, arrays: Mapping[str, np.ndarray]) -> g.Node:
    if not isinstance(value, dict) or not isinstance(value.get("node"), str):
        raise _wrong(where, value, "an object with 'node', a class of nodes")
    kind = value["node"]
    if kind not in _CLASSES:
        raise CodecError(f"{where}.node is {kind!r}; known are {', '.join(_CLASSES)}.")
    content = {name: field for name, field in value.items() if name != "node"}
    fields = _decode_fields(_CLASSES[kind], content, where, arrays)
    if kind == g.Product.__name__:
        _check_packed(content["weights"], fields["weight_bits"], _at(where, "weights"))
    return _CLASSES[kind](**fields)


def _check_packed(weights: Mapping[str, Any], bits: int, where: str) -> None:
    width = stored_bits(bits)
    if weights.get("packed", 8) != width:
        right = f"packed to {width} bits each" if width < 8 else "a byte each"
        raise CodecError(f"{where}: codes of weight_bits {bits} must be {right}.")


def _decode_array(value: Any, where: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    if not isinstance(value, dict) or value.keys() - {"packed"} != {"array", "dtype", "shape"}:
        raise _wrong(where, value, "an object with array, dtype and shape")
    array = arrays.get(value["array"]) if isinstance(value["array"], str) else None
    if array is None:
        raise CodecError(f"{where}: there is no array {value['array']!r}.")
    if "packed" in value:
        array = _unpack(array, value, where)
    if [array.dtype.name, list(array.shape)] != [value["dtype"], value["shape"]]:
        raise CodecError(
            f"{where}: the array is {array.dtype.name}{list(array.shape)}, "
            f"described as {value['dtype']}{value['shape']}."
        )
    return array


def _unpack(packed: np.ndarray, value: dict[str, Any], where: str) -> np.ndarray:
    bits, shape = value["packed"], value["shape"]
    if type(bits) is not int or bits not in (2, 4):
        raise _wrong(f"{where}.packed", bits, "2 or 4")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _wrong(f"{where}.shape", shape, "a list of extents")
    try:
        return unpack(packed, tuple(shape), bits)
    except ValueError as error:
        raise CodecError(f"{where}: {error}") from error


def _decode_float32(value: Any, where: str) -> np.float32:
    try:
        number = float.fromhex(value)
        with np.errstate(over="ignore"):
            single = np.float32(number)
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong(where, value, "a float32 in hexadecimal") from error
    if float(single) != number:
        raise _wrong(where, value, "a float32 in hexadecimal")
    return single


def _items(hint: Any, value: Any, where: str, container: type = tuple) -> list[tuple[Any, Any]]:
    """The items of a tuple, each with its declared type."""
    hints = typing.get_args(hint)
    variadic = hints[-1] is Ellipsis
    if not isinstance(value, container) or not (variadic or len(value) == len(hints)):
        size = "" if variadic else f" of {len(hints)}"
        raise _wrong(where, value, f"a {'tuple' if container is tuple else 'list'}{size}")
    return [(v, hints[0 if variadic else i]) for i, v in enumerate(value)]


def _check_plain(value: Any, hint: Any, where: str) -> None:
    if typing.get_origin(hint) is typing.Literal:
        # 1 == True: the type counts as well.
        if not isinstance(value, str) or value not in typing.get_args(hint):
            raise _wrong(where, value, f"one of {', '.join(typing.get_args(hint))}")
    elif type(value) is not hint:
        raise _wrong(where, value, _PLAIN.get(hint, f"{getattr(hint, '__name__', hint)}"))


def _plain_json(value: Any, where: str) -> Any:
    """The value as it will be read back: tuples have become lists, all else is as it was.

    Raises:
        CodecError: If JSON would drop it or turn it into something else.
    """
    if isinstance(value, list | tuple):
        return [_plain_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str:
                raise CodecError(f"{where}: the key {key!r} is no text.")
        return {key: _plain_json(item, _at(where, key)) for key, item in value.items()}
    finite = type(value) is float and np.isfinite(value)
    if value is None or finite or type(value) in (str, int, bool):
        return value
    raise _wrong(where, value, "what JSON holds: texts, finite numbers, lists, objects with texts")


def _not_none(hint: types.UnionType) -> Any:
    return next(h for h in typing.get_args(hint) if h is not type(None))


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _wrong(where: str, value: Any, right: str) -> CodecError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    return CodecError(f"{where or 'the content'}: must be {right}, got {shown}.")
