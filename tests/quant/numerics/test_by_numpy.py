"""NumPy's sums of codes against sums that are written out, one product at a time."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxqat.quant._numerics import by_numpy
from jaxqat.quant._numerics.products import Convolution, Dot


def codes(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def convolution(x: np.ndarray, w: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """Return the definition of `conv_general_dilated` for two spatial axes, in Python integers."""
    lhs, rhs, out = params["dimension_numbers"]
    x, w = np.transpose(x, lhs).astype(object), np.transpose(w, rhs).astype(object)
    groups, (outputs, inputs, *window) = params["feature_group_count"], w.shape
    sizes = []
    for axis in range(2):
        low, high = params["padding"][axis]
        size = (x.shape[2 + axis] - 1) * params["lhs_dilation"][axis] + 1 + low + high
        reach = (window[axis] - 1) * params["rhs_dilation"][axis] + 1
        sizes.append((size - reach) // params["window_strides"][axis] + 1)
    total = np.zeros((len(x), outputs, *sizes), object)
    for n, o, i, *place in itertools.product(*map(range, (len(x), outputs, inputs, *sizes))):
        channel = o // (outputs // groups) * inputs + i
        for tap in np.ndindex(*window):
            at = [
                p * s + t * d - low
                for p, s, t, d, (low, _) in zip(
                    place,
                    params["window_strides"],
                    tap,
                    params["rhs_dilation"],
                    params["padding"],
                    strict=True,
                )
            ]
            between = [a % d for a, d in zip(at, params["lhs_dilation"], strict=True)]
            at = [a // d for a, d in zip(at, params["lhs_dilation"], strict=True)]
            if not any(between) and all(0 <= a < s for a, s in zip(at, x.shape[2:], strict=True)):
                total[(n, o, *place)] += x[(n, channel, *at)] * w[(o, i, *tap)]
    return np.transpose(total, np.argsort(out)).astype(np.int64)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (("NHWC", "HWIO", "NHWC"), {}),
        (("NCHW", "OIHW", "NCHW"), {"window_strides": (2, 1)}),
        (("NHWC", "OIHW", "NCHW"), {"padding": ((1, 2), (-1, 0))}),
        (("HWNC", "HWIO", "NHWC"), {"rhs_dilation": (1, 2), "padding": ((0, 0), (2, 2))}),
        (("NHWC", "HWIO", "NHWC"), {"lhs_dilation": (2, 3), "padding": ((1, 1), (2, 0))}),
        (("NHWC", "HWIO", "NHWC"), {"feature_group_count": 2}),
        (("NHWC", "HWIO", "NHWC"), {"feature_group_count": 4, "window_strides": (2, 2)}),
    ],
    ids=["plain", "strides", "crop", "dilation", "transposed", "groups", "depthwise"],
)
def test_a_convolution_is_its_definition(layout, options):
    groups = options.get("feature_group_count", 1)
    sizes = {"N": 2, "C": 4, "H": 5, "W": 6, "O": 8, "I": 4 // groups}
    kernel = {**sizes, "H": 3, "W": 2}
    x = codes(0, *(sizes[axis] for axis in layout[0]))
    w = codes(1, *(kernel[axis] for axis in layout[1]))
    params = {
        "window_strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "feature_group_count": 1,
        **options,
        "dimension_numbers": lax.conv_dimension_numbers(x.shape, w.shape, layout),
    }
    product = Convolution(lax.conv_general_dilated_p, params, 4)
    np.testing.assert_array_equal(by_numpy.accumulate(product, x, w), convolution(x, w, params))


@pytest.mark.parametrize(
    ("equation", "left", "right", "weight_side"),
    [
        ("bi,io->bo", (3, 70), (70, 5), 1),
        ("btj,ji->bti", (2, 3, 4), (4, 5), 1),
        ("oi,bi->ob", (5, 70), (3, 70), 0),
        ("gbi,gio->gbo", (2, 3, 4), (2, 4, 5), 1),
        ("bhk,hko->bo", (2, 3, 4), (3, 4, 5), 1),
    ],
)
def test_a_dot_is_its_einsum(equation, left, right, weight_side):
    a, b = codes(0, *left), codes(1, *right)
    operation = lambda *x: jnp.einsum(equation, *x, preferred_element_type=jnp.int32)  # noqa: E731
    closed = jax.make_jaxpr(operation)(a, b)
    while closed.jaxpr.eqns[0].primitive.name in ("jit", "pjit"):
        closed = closed.jaxpr.eqns[0].params["jaxpr"]
    (dot,) = [e for e in closed.jaxpr.eqns if e.primitive.name == "dot_general"]
    product = Dot(dot.primitive, dot.params, len(dot.outvars[0].aval.shape), weight_side)
    x, w = (a, b) if weight_side == 1 else (b, a)
    found = by_numpy.accumulate(product, x, w)
    wanted = np.einsum(equation, a.astype(np.int64), b.astype(np.int64))
    assert found.shape == dot.outvars[0].aval.shape
    np.testing.assert_array_equal(np.sort(found, axis=None), np.sort(wanted, axis=None))
    if found.shape == wanted.shape:  # einsum may transpose its dot's result.
        np.testing.assert_array_equal(found, wanted)
