"""How JAX's primitives become float operations: the operation of each, and its attributes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxqat.integer._convert.geometry import UnconvertibleError

# From an equation's parameters, and the shapes of its operands and result, to attributes.
# 'unbatched' is none of them: the sizes of axes along which the operation mixes elements.
Attributes = Callable[[Mapping[str, Any], list[Any], Any], dict[str, Any]]


def _nothing(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    return {}


def _shape(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    return {"shape": list(out.shape)}


def _reshape(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    if params.get("dimensions") is not None:
        raise UnconvertibleError("a reshape with an order of its own")
    return {"shape": list(out.shape)}


def _round(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    if params["rounding_method"].name != "TO_NEAREST_EVEN":
        raise UnconvertibleError("'round' rounds halves away from zero")
    return {}


def _select(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    if len(avals) != 3 or avals[0].dtype != jnp.bool_:
        raise UnconvertibleError("'select_n' chooses from more than two tensors")
    return {}


def _axes(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    axes = list(params["axes"])
    return {"axes": axes, "unbatched": [avals[0].shape[axis] for axis in axes]}


def _index(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    (axis,) = params["axes"]
    dtype = np.dtype(params["index_dtype"]).name
    return {"axis": axis, "dtype": dtype, "unbatched": [avals[0].shape[axis]]}


def _cumulative(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    axis = params["axis"]
    size = avals[0].shape[axis]
    return {"axis": axis, "reverse": bool(params["reverse"]), "unbatched": [size]}


def _reverse(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    axes = list(params["dimensions"])
    return {"axes": axes, "unbatched": [avals[0].shape[axis] for axis in axes]}


def _slice(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    shape = avals[0].shape
    strides = params["strides"] or (1,) * len(shape)
    parts = zip(shape, params["start_indices"], params["limit_indices"], strides, strict=True)
    return {
        "starts": list(params["start_indices"]),
        "stops": list(params["limit_indices"]),
        "strides": list(strides),
        "unbatched": [size for size, *part in parts if part != [0, size, 1]],
    }


def _pad(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    padding = [list(each) for each in params["padding_config"]]
    sizes = zip(avals[0].shape, padding, strict=True)
    return {"padding": padding, "unbatched": [size for size, each in sizes if any(each)]}


def _concatenate(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    axis = params["dimension"]
    return {"axis": axis, "unbatched": [aval.shape[axis] for aval in avals]}


def _dot(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    contracted, batched = params["dimension_numbers"]
    return {
        "contracted": [list(axes) for axes in contracted],
        "batched": [list(axes) for axes in batched],
        "dtype": np.dtype(out.dtype).name,
        "unbatched": [avals[0].shape[axis] for axis in contracted[0]],
    }


def _conv(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise UnconvertibleError("a convolution that groups the batch")
    return {
        "strides": list(params["window_strides"]),
        "padding": [list(pair) for pair in params["padding"]],
        "dilation": list(params["rhs_dilation"]),
        "input_dilation": list(params["lhs_dilation"]),
        "axes": [list(numbers.lhs_spec), list(numbers.rhs_spec), list(numbers.out_spec)],
        "groups": params["feature_group_count"],
        "dtype": np.dtype(out.dtype).name,
        "unbatched": [avals[0].shape[axis] for axis in numbers.lhs_spec[1:]],
    }


def _window(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    window = list(params["window_dimensions"])
    sizes = zip(avals[0].shape, window, strict=True)
    return {
        "window": window,
        "strides": list(params["window_strides"]),
        "padding": [list(pair) for pair in params["padding"]],
        "dilation": list(params["window_dilation"]),
        "input_dilation": list(params["base_dilation"]),
        "unbatched": [size for size, extent in sizes if extent != 1],
    }


def _gather(params: Mapping[str, Any], avals: list[Any], out: Any) -> dict[str, Any]:
    numbers, sizes = params["dimension_numbers"], list(params["slice_sizes"])
    fill = params["fill_value"]
    if fill is not None and not np.isnan(fill):
        raise UnconvertibleError(
            f"'gather' gives {fill} for places beyond the end of a tensor: use mode='clip', or pad "
            "the tensor"
        )
    batched = set(numbers.operand_batching_dims)
    parts = enumerate(zip(avals[0].shape, sizes, strict=True))
    return {
        "offset_axes": list(numbers.offset_dims),
        "collapsed": list(numbers.collapsed_slice_dims),
        "start_axes": list(numbers.start_index_map),
        "batch_axes": list(numbers.operand_batching_dims),
        "start_batch_axes": list(numbers.start_indices_batching_dims),
        "sizes": sizes,
        "mode": "fill" if params["mode"].name == "FILL_OR_DROP" else params["mode"].name.lower(),
        "unbatched": [n for axis, (n, size) in parts if size != n and axis not in batched],
    }


_SAME = (
    *("abs", "cbrt", "ceil", "cos", "erf", "erfc", "exp", "exp2", "expm1", "floor", "is_finite"),
    *("log", "log1p", "logistic", "neg", "not", "rsqrt", "sign", "sin", "sqrt", "square", "tan"),
    *("tanh", "add", "sub", "mul", "div", "max", "min", "pow", "rem", "atan2", "and", "or", "xor"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
)

# By the name of JAX's primitive: the operation, and how its attributes follow.
ENCODERS: Mapping[str, tuple[str, Attributes]] = MappingProxyType(
    {
        **{name: (name, _nothing) for name in _SAME},
        "add_any": ("add", _nothing),
        "select_n": ("select", _select),
        "integer_pow": ("integer_pow", lambda p, avals, out: {"exponent": p["y"]}),
        "convert_element_type": (
            "cast",
            lambda p, avals, out: {"dtype": np.dtype(p["new_dtype"]).name},
        ),
        **{
            name: (name, _axes)
            for name in (
                *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"),
                *("reduce_and", "reduce_or"),
            )
        },
        "round": ("round", _round),
        **{name: (name, _index) for name in ("argmax", "argmin")},
        **{
            name: (name, _cumulative)
            for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
        },
        "reshape": ("reshape", _reshape),
        "squeeze": ("reshape", _shape),
        "expand_dims": ("reshape", _shape),
        "broadcast_in_dim": (
            "broadcast",
            lambda p, avals, out: {
                "shape": list(out.shape),
                "axes": list(p["broadcast_dimensions"]),
            },
        ),
        "transpose": ("transpose", lambda p, avals, out: {"axes": list(p["permutation"])}),
        "rev": ("reverse", _reverse),
        "slice": ("slice", _slice),
        "pad": ("pad", _pad),
        "concatenate": ("concatenate", _concatenate),
        "iota": (
            "iota",
            lambda p, avals, out: {
                "shape": list(out.shape),
                "axis": p["dimension"],
                "dtype": np.dtype(p["dtype"]).name,
                "unbatched": [out.shape[p["dimension"]]],
            },
        ),
        "dot_general": ("dot", _dot),
        "conv_general_dilated": ("conv", _conv),
        "reduce_window_max": ("window_max", _window),
        "reduce_window_min": ("window_min", _window),
        "reduce_window_sum": ("window_sum", _window),
        "gather": ("gather", _gather),
    }
)
