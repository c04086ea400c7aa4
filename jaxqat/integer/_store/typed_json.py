"""Conversion of dataclasses to JSON values and back, by their type hints.

    json_types = TypedJson()
    content = json_types.encode(value, Result)      value = json_types.decode(content, Result)

Both directions check every value against its declared type. An error names the dotted key, the
expected type and the value. These types are supported, and those with an `Encoding`:

    str, int, float, bool, None     unchanged; an int is a valid float, a bool is not an int
    Literal                         one of its values, of the same type
    tuple, list                     a list; the length of a fixed-length tuple is checked
    dict[str, X], Mapping[str, X]   an object
    X | None, X | Y                 the first alternative that fits
    dataclasses                     an object with one key for each field
    Annotated[X, ...]               as X
    Any, object                     any JSON value, unchanged
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxqat.errors import InputError


class CodecError(InputError):
    """A value is not of its declared type; the message names the dotted key."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Custom encoding and decoding for one type hint.

    Attributes:
        encode: Function of a value and its dotted key; returns a JSON value or raises `CodecError`.
        decode: Function of a JSON value and its dotted key; returns the value or raises
            `CodecError`.
    """

    encode: Callable[[Any, str], Any]
    decode: Callable[[Any, str], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TypedJson:
    """Convert values to JSON and back, by type hints.

    Attributes:
        encodings: By type hint, such as `{np.float32: Encoding(...)}`; they override the supported
            types.
        defaults: Whether to omit fields that equal their default when encoding, and to use the
            default of absent fields when decoding.
        allow_nan: Whether floats may be NaN or infinite, which Python's `json` writes as `NaN` and
            `Infinity`.
    """

    encodings: Mapping[Any, Encoding] = dataclasses.field(default_factory=dict)
    defaults: bool = False
    allow_nan: bool = False

    def encode(self, value: Any, hint: Any, key: str = "") -> Any:
        """Return the JSON value of `value`, which must be of the type `hint`.

        Args:
            value: Value to encode.
            hint: Declared type.
            key: Dotted key of the value, for error messages.

        Raises:
            CodecError: If the value, or a part of it, is not of its declared type.
        """
        return _walk(self, _Encode, value, hint, key)

    def decode(self, value: Any, hint: Any, key: str = "") -> Any:
        """Return the value of type `hint` that `encode` converted to this JSON value.

        Args:
            value: JSON value, as from `json.loads`.
            hint: Declared type.
            key: Dotted key of the value, for error messages.

        Raises:
            CodecError: If the JSON value, or a part of it, does not fit the declared type.
        """
        return _walk(self, _Decode, value, hint, key)

    def encode_fields(self, value: Any, key: str) -> dict[str, Any]:
        """Return the fields of a dataclass instance as JSON values, ignoring its own `Encoding`.

        Raises:
            CodecError: If a field is not of its declared type.
        """
        hints = typing.get_type_hints(type(value), include_extras=True)
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if not (self.defaults and _is_default(field, part)):
                fields[field.name] = self.encode(part, hints[field.name], at(key, field.name))
        return fields

    def decode_fields(self, content: Any, cls: type, key: str) -> dict[str, Any]:
        """Return the decoded fields of a dataclass by name, ignoring its own `Encoding`.

        Raises:
            CodecError: If a key is unknown or missing, or a value does not fit its declared type.
        """
        hints = typing.get_type_hints(cls, include_extras=True)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(content, dict):
            raise wrong(key, content, f"an object with the fields of {cls.__name__}")
        for name in content:
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, 1, cutoff=0.0)
                hint = f"; the closest is {near[0]!r}" if near else ""
                raise CodecError(f"{at(key, name)}: {cls.__name__} has no such field{hint}.")
        for name, field in fields.items():
            if name not in content and not (self.defaults and _has_default(field)):
                raise CodecError(f"{at(key, name)}: is missing.")
        return {
            name: self.decode(content[name], hints[name], at(key, name))
            for name in fields
            if name in content
        }


def at(key: str, name: str) -> str:
    """Return the dotted key of a field in the object under `key`."""
    return f"{key}.{name}" if key else name


def wrong(key: str, value: Any, expected: str) -> CodecError:
    """Return an error that names the key, the expected type and the value."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    return CodecError(f"{key or 'the content'}: must be {expected}, got {shown}.")


class _Encode:
    """Direction from values to JSON: containers, encodings and dataclasses."""

    sequence: type | None = None  # None: the declared type.
    mapping = Mapping

    @staticmethod
    def custom(encoding: Encoding) -> Callable[[Any, str], Any]:
        return encoding.encode

    @staticmethod
    def instance(codec: TypedJson, value: Any, cls: type, key: str) -> Any:
        if type(value) is not cls:
            raise wrong(key, value, f"a {cls.__name__}")
        return codec.encode_fields(value, key)

    @staticmethod
    def collect(items: list[Any], declared: type) -> Any:
        return items


class _Decode:
    """Direction from JSON to values."""

    sequence: type | None = list
    mapping = dict

    @staticmethod
    def custom(encoding: Encoding) -> Callable[[Any, str], Any]:
        return encoding.decode

    @staticmethod
    def instance(codec: TypedJson, value: Any, cls: type, key: str) -> Any:
        return cls(**codec.decode_fields(value, cls, key))

    @staticmethod
    def collect(items: list[Any], declared: type) -> Any:
        return declared(items)


_Direction = type[_Encode] | type[_Decode]


def _walk(codec: TypedJson, direction: _Direction, value: Any, hint: Any, key: str) -> Any:
    """Check a value against its type hint and convert it in one direction."""
    if hint in codec.encodings:
        return direction.custom(codec.encodings[hint])(value, key)
    if hint is Any or hint is object:
        return _json_value(codec, value, key)
    if dataclasses.is_dataclass(hint):
        return direction.instance(codec, value, typing.cast(type, hint), key)
    origin = typing.get_origin(hint) or hint
    if origin is typing.Annotated:
        return _walk(codec, direction, value, typing.get_args(hint)[0], key)
    if origin in (typing.Union, types.UnionType):
        return _union(codec, direction, value, typing.get_args(hint), key)
    if origin is typing.Literal:
        return _literal(value, typing.get_args(hint), key)
    if origin in (tuple, list):
        return _sequence(codec, direction, value, hint, key)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(codec, direction, value, hint, key)
    return _scalar(codec, value, hint, key)


def _union(
    codec: TypedJson, direction: _Direction, value: Any, hints: tuple[Any, ...], key: str
) -> Any:
    others = [hint for hint in hints if hint is not type(None)]
    if value is None and len(others) < len(hints):
        return None
    if len(others) == 1:  # Its error is more specific than the one below.
        return _walk(codec, direction, value, others[0], key)
    for hint in others:
        try:
            return _walk(codec, direction, value, hint, key)
        except CodecError:
            continue
    raise wrong(key, value, " or ".join(_type_name(hint) for hint in hints))


def _literal(value: Any, choices: tuple[Any, ...], key: str) -> Any:
    # 1 == True, so compare types too.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise wrong(key, value, f"one of {', '.join(map(str, choices))}")
    return value


def _sequence(codec: TypedJson, direction: _Direction, value: Any, hint: Any, key: str) -> Any:
    declared = typing.get_origin(hint) or hint
    hints = typing.get_args(hint) or (Any, ...)
    any_length = declared is list or hints[-1:] == (...,)
    container = direction.sequence or declared
    if not isinstance(value, container) or not (any_length or len(value) == len(hints)):
        size = "" if any_length else f" of {len(hints)}"
        raise wrong(key, value, f"a {container.__name__}{size}")
    items = [
        _walk(codec, direction, item, hints[0 if any_length else i], f"{key}[{i}]")
        for i, item in enumerate(value)
    ]
    return direction.collect(items, declared)


def _mapping(
    codec: TypedJson, direction: _Direction, value: Any, hint: Any, key: str
) -> dict[str, Any]:
    if not isinstance(value, direction.mapping):
        raise wrong(key, value, "an object")
    _, item_hint = typing.get_args(hint) or (str, Any)
    _check_names(value, key)
    return {
        name: _walk(codec, direction, item, item_hint, at(key, name))
        for name, item in value.items()
    }


def _scalar(codec: TypedJson, value: Any, hint: Any, key: str) -> Any:
    if hint is float:
        return _float(codec, value, key)
    if type(value) is not hint:
        raise wrong(key, value, _type_name(hint))
    return value


def _float(codec: TypedJson, value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(key, value, "a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise wrong(key, value, "a number within the range of float64") from error
    if not (codec.allow_nan or np.isfinite(number)):
        raise wrong(key, value, "a finite number")
    return number


def _json_value(codec: TypedJson, value: Any, key: str) -> Any:
    """Return the value with tuples as lists, as JSON stores it.

    Raises:
        CodecError: If JSON would lose or change the value.
    """
    if isinstance(value, list | tuple):
        return [_json_value(codec, item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        _check_names(value, key)
        return {name: _json_value(codec, item, at(key, name)) for name, item in value.items()}
    number = type(value) is float and (codec.allow_nan or np.isfinite(value))
    if value is None or number or type(value) in (str, int, bool):
        return value
    raise wrong(key, value, "a JSON value (string, finite number, boolean, null, list or object)")


def _check_names(mapping: Mapping[Any, Any], key: str) -> None:
    for name in mapping:
        if type(name) is not str:
            raise CodecError(f"{key or 'the content'}: the key {name!r} must be a string.")


def _type_name(hint: Any) -> str:
    """Return the name of a type for an error message."""
    known = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    if hint is type(None) or hint is None:
        return "null"
    return known.get(hint) or getattr(hint, "__name__", None) or str(hint)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        default = field.default
    # 1 == True, so compare types too. Arrays, whose == has no truth value, are never omitted.
    return type(value) is type(default) and not isinstance(value, np.ndarray) and value == default
