"""Execution of float operations: the operations of `FloatOp`, each by its function of `jax.lax`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxqat.integer._nodes.float_op import FloatOp, at_batch

# An operation: of its attributes and operands.
_Run = Callable[[Mapping[str, Any], list[Any]], Any]


def evaluate(node: FloatOp, inputs: list[Any], batch: Any) -> Array:
    """Return the result of an operation.

    Args:
        node: The operation.
        inputs: Its inputs, real numbers.
        batch: Size of the batch.
    """
    waiting = iter(inputs)
    operands = [next(waiting) if value is None else value for value in node.constants]
    attributes = {key: at_batch(value, batch) for key, value in node.attributes.items()}
    return _OPERATIONS[node.operation](attributes, operands)


def _plain(function: Callable[..., Any]) -> _Run:
    return lambda attributes, operands: function(*_of_one_type(operands))


def _of_one_type(operands: list[Any]) -> list[Any]:
    """Return operands as arrays of equal rank: a constant may be a number beside an array."""
    arrays = [jnp.asarray(x) for x in operands]
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))  # Sizes may be symbolic.
    return [x if x.shape == shape else jnp.broadcast_to(x, shape) for x in arrays]


def _select(attributes: Mapping[str, Any], operands: list[Any]) -> Array:
    mask, *cases = operands
    cases = _of_one_type(cases)
    return lax.select_n(jnp.broadcast_to(mask, cases[0].shape), *cases)


def _reduce(function: Callable[..., Any]) -> _Run:
    return lambda attributes, operands: function(operands[0], axis=tuple(attributes["axes"]))


def _index(function: Callable[..., Any]) -> _Run:
    return lambda a, operands: function(operands[0], a["axis"], np.dtype(a["dtype"]))


def _cumulative(function: Callable[..., Any]) -> _Run:
    return lambda a, operands: function(operands[0], axis=a["axis"], reverse=a["reverse"])


def _dot(attributes: Mapping[str, Any], operands: list[Any]) -> Array:
    left, right = operands
    numbers: Any = [tuple(map(tuple, attributes[key])) for key in ("contracted", "batched")]
    return lax.dot_general(
        left,
        right,
        numbers,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=_type(attributes["dtype"]),
    )


def _conv(attributes: Mapping[str, Any], operands: list[Any]) -> Array:
    x, weights = operands
    return lax.conv_general_dilated(
        x,
        weights,
        attributes["strides"],
        _pairs(attributes["padding"]),
        lhs_dilation=attributes["input_dilation"],
        rhs_dilation=attributes["dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(*map(tuple, attributes["axes"])),
        feature_group_count=attributes["groups"],
        precision=lax.Precision.HIGHEST,
        preferred_element_type=_type(attributes["dtype"]),
    )


def _window(reduce: Callable[..., Any], initial: Callable[[Any], Any]) -> _Run:
    def run(attributes: Mapping[str, Any], operands: list[Any]) -> Array:
        (x,) = operands
        return lax.reduce_window(
            x,
            np.asarray(initial(x.dtype), x.dtype),
            reduce,
            tuple(attributes["window"]),
            tuple(attributes["strides"]),
            _pairs(attributes["padding"]),
            tuple(attributes["input_dilation"]),
            tuple(attributes["dilation"]),
        )

    return run


def _gather(attributes: Mapping[str, Any], operands: list[Any]) -> Array:
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(attributes["offset_axes"]),
        collapsed_slice_dims=tuple(attributes["collapsed"]),
        start_index_map=tuple(attributes["start_axes"]),
        operand_batching_dims=tuple(attributes["batch_axes"]),
        start_indices_batching_dims=tuple(attributes["start_batch_axes"]),
    )
    mode = lax.GatherScatterMode.from_any(attributes["mode"])
    table, indices = map(jnp.asarray, operands)
    return lax.gather(table, indices, numbers, tuple(attributes["sizes"]), mode=mode)


def _pad(attributes: Mapping[str, Any], operands: list[Any]) -> Array:
    x, fill = operands
    return lax.pad(x, jnp.asarray(fill, x.dtype), [tuple(p) for p in attributes["padding"]])


def _pairs(values: list[Any]) -> tuple[tuple[int, int], ...]:
    return tuple((low, high) for low, high in values)


def _type(name: str | None) -> Any:
    return None if name is None else np.dtype(name)


def _lowest(dtype: Any) -> Any:
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    return np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


_OPERATIONS: Mapping[str, _Run] = MappingProxyType(
    {
        **{
            name: _plain(getattr(lax, name))
            for name in (
                *("abs", "cbrt", "ceil", "cos", "erf", "erfc", "exp", "exp2", "expm1", "floor"),
                *("is_finite", "log", "log1p", "logistic", "neg", "rsqrt", "sign", "sin"),
                *("sqrt", "square", "tan", "tanh", "add", "sub", "mul", "div", "max", "min"),
                *("pow", "rem", "atan2", "eq", "ne", "lt", "le", "gt", "ge"),
            )
        },
        "round": _plain(jnp.round),  # Half to even.
        "not": _plain(lax.bitwise_not),
        "and": _plain(lax.bitwise_and),
        "or": _plain(lax.bitwise_or),
        "xor": _plain(lax.bitwise_xor),
        "select": _select,
        "integer_pow": lambda a, x: lax.integer_pow(x[0], a["exponent"]),
        "cast": lambda a, x: lax.convert_element_type(x[0], np.dtype(a["dtype"])),
        "reduce_sum": _reduce(jnp.sum),
        "reduce_max": _reduce(jnp.max),
        "reduce_min": _reduce(jnp.min),
        "reduce_prod": _reduce(jnp.prod),
        "reduce_and": _reduce(jnp.all),
        "reduce_or": _reduce(jnp.any),
        "argmax": _index(lax.argmax),
        "argmin": _index(lax.argmin),
        "cumsum": _cumulative(lax.cumsum),
        "cumprod": _cumulative(lax.cumprod),
        "cummax": _cumulative(lax.cummax),
        "cummin": _cumulative(lax.cummin),
        "cumlogsumexp": _cumulative(lax.cumlogsumexp),
        "reshape": lambda a, x: lax.reshape(x[0], a["shape"]),
        "broadcast": lambda a, x: lax.broadcast_in_dim(
            jnp.asarray(x[0]), tuple(a["shape"]), tuple(a["axes"])
        ),
        "transpose": lambda a, x: lax.transpose(x[0], a["axes"]),
        "reverse": lambda a, x: lax.rev(x[0], a["axes"]),
        "slice": lambda a, x: lax.slice(x[0], a["starts"], a["stops"], a["strides"]),
        "pad": _pad,
        "concatenate": lambda a, x: lax.concatenate([jnp.asarray(part) for part in x], a["axis"]),
        "iota": lambda a, x: lax.broadcasted_iota(np.dtype(a["dtype"]), a["shape"], a["axis"]),
        "dot": _dot,
        "conv": _conv,
        "window_max": _window(lax.max, _lowest),
        "window_min": _window(lax.min, _highest),
        "window_sum": _window(lax.add, lambda dtype: 0),
        "gather": _gather,
    }
)
