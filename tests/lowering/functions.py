"""Small functions with one product each, and whether it must count as an integer product."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

F32, BF16, S8, S32 = jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32


def shape(*dims: int, dtype: Any = S8) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype)


def convolve(x, w, dtype, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
        feature_group_count=groups,
    )


def dot(x, w, dtype):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=dtype)


def requantize(total, multiplier):
    return jnp.clip(jnp.round(total * multiplier), -127, 127).astype(S8)


def fake_quantize(x, scale):
    return jnp.clip(jnp.round(x / scale), -127, 127) * scale


class Case(NamedTuple):
    function: Any
    shapes: tuple[Any, ...]
    kind: str
    is_integer: bool


_IMAGES, _KERNEL, _CHANNELS = (8, 16, 16, 64), (3, 3, 64, 64), shape(64, dtype=F32)
_ROWS, _MATRIX = (256, 512), (512, 128)

CASES = {
    "s8_convolution": Case(
        # Directly to float32: cuDNN has no s8 convolution that returns its s32 sums.
        lambda x, w, m: requantize(convolve(x, w, S32).astype(F32), m),
        (shape(*_IMAGES), shape(*_KERNEL), _CHANNELS),
        "convolution",
        True,
    ),
    "s8_depthwise_convolution": Case(
        lambda x, w: convolve(x, w, S32, groups=64).astype(F32),
        (shape(*_IMAGES), shape(3, 3, 1, 64)),
        "convolution",
        True,
    ),
    "float_convolution": Case(
        lambda x, w: jax.nn.relu(convolve(x, w, F32)),
        (shape(*_IMAGES, dtype=F32), shape(*_KERNEL, dtype=F32)),
        "convolution",
        False,
    ),
    "fake_quantized_convolution": Case(
        lambda x, w: convolve(fake_quantize(x, 0.1), fake_quantize(w, 0.01), F32),
        (shape(*_IMAGES, dtype=F32), shape(*_KERNEL, dtype=F32)),
        "convolution",
        False,
    ),
    "codes_convolved_in_bfloat16": Case(
        lambda x, w: convolve(x.astype(BF16), w.astype(BF16), F32),
        (shape(*_IMAGES), shape(*_KERNEL)),
        "convolution",
        False,
    ),
    "s8_dot": Case(
        lambda x, w, m: requantize(dot(x, w, S32).astype(F32), m),
        (shape(*_ROWS), shape(*_MATRIX), shape(128, dtype=F32)),
        "dot",
        True,
    ),
    "s8_dot_of_ten_classes": Case(
        lambda x, w: dot(x, w, S32).astype(F32), (shape(32, 512), shape(512, 10)), "dot", True
    ),
    "s8_dot_of_one_row": Case(
        lambda x, w: dot(x, w, S32).astype(F32), (shape(1, 512), shape(512, 10)), "dot", True
    ),
    "float_dot": Case(
        lambda x, w: jax.nn.relu(dot(x, w, F32)),
        (shape(*_ROWS, dtype=F32), shape(*_MATRIX, dtype=F32)),
        "dot",
        False,
    ),
    "codes_multiplied_in_bfloat16": Case(
        lambda x, w: dot(x.astype(BF16), w.astype(BF16), F32),
        (shape(*_ROWS), shape(*_MATRIX)),
        "dot",
        False,
    ),
}
