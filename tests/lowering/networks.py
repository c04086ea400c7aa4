"""A residual integer network written by hand in plain JAX, for every platform."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from lowering.functions import F32, S8, S32, shape

CLASSES = 10
CONVOLUTIONS = 6


def convolve(x, layer, stride=1):
    """Convolve (s8 x s8 -> s32), convert directly to float32, requantize and round."""
    pad = layer["weights"].shape[0] // 2
    total = lax.conv_general_dilated(
        x,
        layer["weights"],
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=S32,
    ).astype(F32)
    return jnp.round((total + layer["bias"]) * layer["multiplier"])


def to_codes(steps, low):
    return jnp.clip(steps, low, 127).astype(S8)


def network(layers: dict[str, Any], x: Any) -> Any:
    """Stem, a block with an identity shortcut, one with a projection, pooling, head."""

    def block(name, x, stride):
        with jax.named_scope(name):
            y = to_codes(convolve(x, layers[name]["conv1"], stride), 0)
            y = to_codes(convolve(y, layers[name]["conv2"]), -128)
            shortcut = layers[name].get("shortcut")
            if shortcut is None:
                x = jnp.round(x.astype(F32) * 0.7)
            else:
                x = to_codes(convolve(x, shortcut, stride), -128).astype(F32)
            return to_codes(y.astype(F32) + x, 0)

    with jax.named_scope("stem"):
        x = to_codes(convolve(x, layers["stem"]), 0)
    x = block("block0", x, 1)
    x = block("block1", x, 2)
    x = to_codes(jnp.round(x.astype(S32).sum((1, 2)).astype(F32) * 0.01), 0)
    head = layers["head"]
    with jax.named_scope("head"):
        total = lax.dot_general(
            x, head["weights"], (((1,), (0,)), ((), ())), preferred_element_type=S32
        )
        return total.astype(F32) * head["multiplier"]


def network_shapes(width: int) -> dict[str, Any]:
    """Return the shapes of the network's weights."""

    def product(*dims):
        channels = shape(dims[-1], dtype=F32)
        return {"weights": shape(*dims), "bias": channels, "multiplier": channels}

    return {
        "stem": product(3, 3, 4, width),
        "block0": {
            "conv1": product(3, 3, width, width),
            "conv2": product(3, 3, width, width),
        },
        "block1": {
            "conv1": product(3, 3, width, 2 * width),
            "conv2": product(3, 3, 2 * width, 2 * width),
            "shortcut": product(1, 1, width, 2 * width),
        },
        "head": product(2 * width, CLASSES),
    }
