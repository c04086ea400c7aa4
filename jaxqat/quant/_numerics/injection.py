"""Products by AQT: its quantizers make the codes of weights, its `DotGeneralRaw` the product.

A product gets AQT's own configuration object, a `DotGeneralRaw`, with a quantizer for each side.
The side of the activations has none: their codes are given, as a full `QTensor`. The side of the
weights has AQT's `IntSymmetric` numerics and AQT's calibration.

`DotGeneralRaw` returns real values, rounded twice (the sum times one scale, times the other), which
no integer network can repeat, and its backward pass drops zero points. So the sums are read where
AQT asks for the product of the codes (its field `dot_general`), in int32; requantization and
gradients are ours (`multiply`). AQT's convolution casts codes to float and has no gradient (AQT
issue 285): a convolution takes AQT's configuration and quantizers, and multiplies by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from aqt.jax.v2 import aqt_dot_general, aqt_quantizer, aqt_tensor
from aqt.jax.v2 import calibration as aqt_calibration
from aqt.jax.v2 import utils as aqt_utils
from aqt.jax.v2.numerics import int_numerics, no_numerics
from jax import lax
from jaxtyping import Array, Float, Int, Int8

# AQT builds its dataclasses with a decorator of its own, which type checkers do not see through.
_Context: Any = aqt_utils.Context
_DotGeneralRaw: Any = aqt_dot_general.DotGeneralRaw
_Tensor: Any = aqt_dot_general.Tensor
_DotGeneralQuantizer: Any = aqt_dot_general.DefaultDotGeneralQuantizer
_IntSymmetric: Any = int_numerics.IntSymmetric
_NoNumerics: Any = no_numerics.NoNumerics
_QTensor: Any = aqt_tensor.QTensor
_Quantizer: Any = aqt_quantizer.Quantizer

AbsMax: Any = aqt_calibration.AbsMaxCalibration
CONTEXT = _Context(key=None, train_step=None)


def make_quantizer(numerics: Any, calibration: Any, axes: Sequence[int] | str | None) -> Any:
    """Return an AQT quantizer whose scale has no gradient; its calibration is not initialized.

    Args:
        numerics: AQT numerics.
        calibration: AQT calibration class; None with `NoNumerics`.
        axes: Axes that share one scale, or 'per_tensor'.
    """
    return _Quantizer(
        numerics=numerics,
        calib_shared_axes=axes,
        scale_stop_grad=True,
        calibration=calibration,
        context=CONTEXT,
    )


def symmetric(bits: int) -> Any:
    """Return AQT's numerics for codes -(2**(bits-1)-1) .. 2**(bits-1)-1."""
    return _IntSymmetric(
        bits=bits,
        preserve_zero=True,
        preserve_max_val=True,  # Without it, AQT divides by 127.5 and loses half a code.
        clip=True,
        clip_gradient=False,  # The caller knows what was clipped.
        round=True,
        noise_fn=None,
        dtype=jnp.int8,
    )


class Weights(NamedTuple):
    """Weights as AQT takes them: to be quantized by it, or quantized already.

    Attributes:
        values: Float32.
        quantizer: AQT quantizer of them.
        tensor: Full QTensor, if they are quantized already; the quantizer does nothing then.
    """

    values: Float[Array, "..."]
    quantizer: Any
    tensor: Any = None


def to_quantize(
    values: Float[Array, "..."], bits: int, axes: Sequence[int], calibration: Any
) -> Weights:
    """Return weights for AQT to quantize; `axes` share one scale."""
    return Weights(values, make_quantizer(symmetric(bits), calibration, axes))


def quantized_already(
    values: Float[Array, "..."], codes: Int8[Array, "..."], scale: Float[Array, "..."]
) -> Weights:
    """Return weights with codes and scale of their own, as a full QTensor."""
    return Weights(values, _nothing(), _full(codes, [scale]))


class Sums(NamedTuple):
    """The sums of a product of codes, int32, and the codes and scale of its weights."""

    total: Int[Array, "..."]
    codes: Int8[Array, "..."]
    scale: Float[Array, "..."]


def dot_general(
    codes: Int8[Array, "..."],
    weights: Weights,
    dimension_numbers: lax.DotDimensionNumbers,
    weight_side: int,
) -> Sums:
    """Multiply codes of activations and weights by AQT's `DotGeneralRaw`.

    Args:
        codes: Of the activations.
        weights: Of the layer.
        dimension_numbers: Of the dot.
        weight_side: 0 if the weights are the left operand, 1 if they are the right one.
    """
    operands = _ordered(codes, weights.values, weight_side)
    quantizers = _ordered(_nothing(), weights.quantizer, weight_side)
    tensors = _ordered(_full(codes, []), weights.tensor, weight_side)
    total, residuals = _dot_general(operands, quantizers, tensors, dimension_numbers)
    tensor = (residuals.lhs if weight_side == 0 else residuals.rhs).mt.qx
    return Sums(total, tensor.qvalue, tensor.scale[0])


def dot_general_of_codes(
    left: Int8[Array, "..."],
    right: Int8[Array, "..."],
    dimension_numbers: lax.DotDimensionNumbers,
) -> Int[Array, "..."]:
    """Multiply codes of two activations by AQT's `DotGeneralRaw`; return the sums, int32."""
    tensors = (_full(left, []), _full(right, []))
    quantizers = (_nothing(), _nothing())
    return _dot_general((left, right), quantizers, tensors, dimension_numbers)[0]


def _dot_general(
    operands: tuple[Any, Any],
    quantizers: tuple[Any, Any],
    tensors: tuple[Any, Any],
    dimension_numbers: lax.DotDimensionNumbers,
) -> tuple[Array, Any]:
    """Return the int32 sums of AQT's product, and its residuals, which hold the codes."""
    sums: list[Array] = []

    def integer_dot(*operands: Any, **options: Any) -> Array:
        sums.append(lax.dot_general(*operands, **options))
        return sums[0]

    raw = _configuration(quantizers, integer_dot)
    raw.dg_quantizer.init_calibration()
    residuals = raw(*operands, *tensors, dimension_numbers)[1]
    return sums[0], residuals


def conv_general_dilated(
    codes: Int8[Array, "..."],
    weights: Weights,
    accumulate: Callable[[Array, Array], Array],
) -> Sums:
    """Multiply codes of activations and weights, quantized as AQT's convolution does it.

    Args:
        codes: Of the activations.
        weights: Of the layer, the right operand.
        accumulate: Returns the int32 sums of a convolution of codes.
    """
    raw = _configuration((_nothing(), weights.quantizer), lax.dot_general)
    raw.dg_quantizer.init_calibration()
    tensor = aqt_dot_general.quant(
        codes,
        weights.values,
        _full(codes, []),
        weights.tensor,
        raw.dg_quantizer,
        raw.lhs,
        raw.rhs,
        None,  # pyright: ignore[reportArgumentType]  # As AQT's convolution passes it.
        raw.allow_dummy_gradient_into_qtensor,
    )[1][0]
    qvalue: Any = tensor.qvalue
    scale: Any = tensor.scale
    return Sums(accumulate(codes, qvalue), qvalue, scale[0])


def _configuration(quantizers: tuple[Any, Any], dot_general: Any) -> Any:
    return _DotGeneralRaw(
        lhs=_Tensor(),
        rhs=_Tensor(),
        dg_quantizer=_DotGeneralQuantizer(
            lhs=quantizers[0], rhs=quantizers[1], lhs_mid=_nothing(), rhs_mid=_nothing()
        ),
        dg_accumulator_dtype=jnp.int32,
        local_aqt=None,
        jax_scope_name="aqt_fwd",
        dot_general=dot_general,
    )


def _nothing() -> Any:
    """Return an AQT quantizer that leaves a tensor as it is."""
    return make_quantizer(_NoNumerics(), None, None)


def _full(codes: Int8[Array, "..."], scale: list[Array]) -> Any:
    return _QTensor(
        qvalue=codes, scale=scale, scale_t=None, bias=[], dequant_dtype=jnp.dtype(jnp.float32)
    )


def _ordered(data: Any, weights: Any, weight_side: int) -> tuple[Any, Any]:
    return (weights, data) if weight_side == 0 else (data, weights)
