"""Numbers of JSON files with bounds, which are checked when a file is read.

accuracy: Share     n: Count        `TypedJson(encodings=BOUNDS)` decodes them.
"""

from typing import Annotated, Any

from jaxqat.integer._store.typed_json import Encoding, TypedJson, wrong

Share = Annotated[float, "share"]
"""A number in 0..1."""

Amount = Annotated[float, "amount"]
"""A finite number of 0 or more."""

Real = Annotated[float, "real"]
"""A number within the range of float32."""

Count = Annotated[int, "count"]
"""A whole number in 0..2**63 - 1."""

_PLAIN = TypedJson()
_ROUNDING = 1e-6  # Of a mean in float32, which may leave its bounds by so much.


def _bounded(hint: type, low: float, high: float, expected: str) -> Encoding:
    def encode(value: Any, key: str) -> Any:
        return _PLAIN.encode(value, hint, key)

    def decode(value: Any, key: str) -> Any:
        number = _PLAIN.decode(value, hint, key)
        if not low <= number <= high:
            raise wrong(key, value, expected)
        return number

    return Encoding(encode, decode)


BOUNDS: dict[Any, Encoding] = {
    Share: _bounded(float, -_ROUNDING, 1 + _ROUNDING, "a number in 0..1"),
    Amount: _bounded(float, -_ROUNDING, float("inf"), "a number of 0 or more"),
    Real: _bounded(float, -(2.0**128), 2.0**128, "a number within the range of float32"),
    Count: _bounded(int, 0, 2**63 - 1, "a whole number in 0..2**63 - 1"),
}
