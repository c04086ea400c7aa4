"""Products run through AQT: its quantizers make the weights' codes, its dot multiplies them."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aqt.jax.v2 import aqt_dot_general, aqt_quantizer
from aqt.jax.v2.numerics import int_numerics

import jaxqat
from jaxqat.quant._numerics import injection

pytestmark = pytest.mark.slow


class Network(nn.Module):
    """One product of each kind: convolutions, dense layers, products of two activations."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.Dense(16, name="dense")(x.reshape(x.shape[0], -1, 8)))
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(3, name="head")(x.mean(axis=1))


CONVOLUTIONS = ("conv", "depthwise")
DENSE = ("dense", *(f"attention/{name}" for name in ("query", "key", "value", "out")), "head")
RECIPES = {
    "int8": jaxqat.Recipe(rules=(jaxqat.Rule(kind="attention"),)),
    "groups": jaxqat.Recipe(
        rules=(
            jaxqat.Rule(path="dense", weight_granularity="per_group", group_size=4),
            jaxqat.Rule(kind="attention"),
        )
    ),
    "dynamic": jaxqat.Recipe.preset("int8_dynamic"),
    "w4a4_lsq": jaxqat.Recipe.preset("w4a4_lsq"),
    "mse": jaxqat.Recipe(weight_range="mse"),
}
IMAGES = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
VARIABLES = Network().init(jax.random.key(1), IMAGES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_product_and_no_other_code_multiplies_by_aqt(name, monkeypatch):
    calls = Counter()

    def counted(owner, method, key):
        original = getattr(owner, method)

        def call(self, *args, **kwargs):
            calls[key(self)] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, call)

    model = jaxqat.quantize(Network(), RECIPES[name])
    variables = model.calibrate(VARIABLES, IMAGES)
    assert [layer.path for layer in model.layers(variables, IMAGES)][:2] == list(CONVOLUTIONS)
    counted(aqt_dot_general.DotGeneralRaw, "__call__", lambda _: "dot")
    counted(aqt_quantizer.Quantizer, "calculate_qvalue", lambda self: type(self.numerics).__name__)
    jaxpr = jax.make_jaxpr(lambda v: model.apply(v, IMAGES))(variables)

    pairs = 2 if any(rule.kind == "attention" for rule in RECIPES[name].rules) else 0
    assert calls["dot"] == len(DENSE) + pairs
    by_aqt = RECIPES[name].weight_range == "absmax"  # Others give AQT their own codes.
    assert calls["IntSymmetric"] == (len(CONVOLUTIONS) + len(DENSE) if by_aqt else 0)
    # No product of floats is left but those of attention, without a rule for them.
    text = str(jaxpr)
    assert text.count("dot_general[") - text.count("preferred_element_type=int32") <= 2 - pairs


def test_without_the_numerics_of_aqt_there_are_no_codes(monkeypatch):
    """Replace AQT's rounding by zeros: every product becomes 0, so only the bias is left."""
    model = jaxqat.quantize(Network(), "int8")
    variables = model.calibrate(VARIABLES, IMAGES)
    bias = jnp.arange(1.0, 4.0)
    variables["params"]["head"]["bias"] = bias
    assert not np.allclose(model.apply(variables, IMAGES), bias, atol=0.01)

    def zeros(self, x, context):
        return jnp.zeros(x.shape, jnp.int8), (x,)

    monkeypatch.setattr(int_numerics.IntSymmetric, "vjp_fwd", zeros)
    jax.clear_caches()  # Of programs with AQT's own.
    result = model.apply(variables, IMAGES)
    jax.clear_caches()
    # The bias is rounded to units of the accumulator, s_x s_w, of less than 0.001 here.
    np.testing.assert_allclose(result, np.broadcast_to(bias, result.shape), atol=0.001)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("given", [False, True], ids=["quantized by AQT", "quantized already"])
def test_sums_codes_and_scales_are_those_of_the_definition(side, given):
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (2, 5, 300)).astype(np.int8)
    weights = rng.normal(size=(2, 300, 7)).astype(np.float32)
    exact = np.abs(weights.astype(np.float64)).max(1, keepdims=True) / 127
    if given:
        own = np.round(weights / exact / 2).astype(np.int8), (2 * exact).astype(np.float32)
        operand = injection.quantized_already(jnp.asarray(weights), *map(jnp.asarray, own))
    else:
        operand = injection.to_quantize(jnp.asarray(weights), 8, (1,), injection.AbsMax)
        own = np.round(weights / exact).astype(np.int8), exact.astype(np.float32)
    contracting = ((1,), (2,)) if side == 0 else ((2,), (1,))
    numbers = (contracting, ((0,), (0,)))
    total, found, scale = injection.dot_general(jnp.asarray(codes), operand, numbers, side)

    # No quotient of this draw lies within its four float32 roundings of a tie.
    assert given or np.abs(weights / exact % 1 - 0.5).min() > 127 * 2**-22
    np.testing.assert_array_equal(found, own[0])
    np.testing.assert_allclose(scale, own[1], rtol=2**-23)
    expected = codes.astype(np.int64) @ own[0].astype(np.int64)
    assert total.dtype == jnp.int32 and np.abs(expected).max() > 2**15
    np.testing.assert_array_equal(total, expected if side else expected.transpose(0, 2, 1))
