"""The table of `describe`, against counts by hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqat

IMAGES = np.ones((2, 8, 8, 3), np.float32)


class Gated(nn.Module):
    """A convolution, a gate without an integer form, a product of two activations, a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        x = nn.swish(nn.Conv(8, (3, 3), name="gated")(x))
        x = jnp.einsum("nhwc,nhwd->ncd", x, x)
        return nn.Dense(5, name="head")(x.reshape(x.shape[0], -1))


RULES = (
    jaxqat.Rule(path="head", weight_bits=None, act_bits=None),
    jaxqat.Rule(path="gated", weight_bits=4, act_bits=6),
)


@pytest.fixture(scope="module")
def variables():
    return Gated().init(jax.random.key(0), IMAGES)


def test_it_tells_bits_ranges_work_and_bytes_of_every_product(variables):
    recipe = jaxqat.Recipe(rules=RULES, weight_granularity="per_tensor")
    network = jaxqat.calibrate(Gated(), variables, batches=[IMAGES], recipe=recipe)
    found = jaxqat.describe(network, IMAGES)
    rows = [
        (layer.path, layer.weight_bits, layer.act_bits, layer.macs, row.weight_bytes)
        for row in found.layers
        for layer in (row.layer,)
    ]
    pixels = 2 * 8 * 8
    assert rows == [
        ("conv", 8, 8, pixels * 9 * 3 * 8, 9 * 3 * 8),
        ("gated", 4, 6, pixels * 9 * 8 * 8, 9 * 8 * 8 // 2),
        (found.layers[2].layer.path, None, None, pixels * 8 * 8, 0),
        ("head", None, None, 2 * 64 * 5, 4 * 64 * 5),
    ]
    assert found.layers[0].input_range == (1.0, 1.0)
    convolved: Any = nn.Conv(8, (3, 3)).apply({"params": variables["params"]["conv"]}, IMAGES)
    hidden = nn.relu(convolved)
    # Sums of 27 products.
    low, high = found.layers[1].input_range or (0, 0)
    np.testing.assert_allclose([low, high], [hidden.min(), hidden.max()], rtol=2**-20)
    shown = str(found)
    assert "28.3 % of the weights' bytes are codes" in shown  # (216 + 288) / (504 + 1280)
    assert "in float: head: the recipe leaves it in float" in shown
    assert "both operands depend on the data" in shown
    assert "tensor" in shown.splitlines()[1]


def test_it_names_what_has_no_integer_form_between_the_products(variables):
    found = jaxqat.describe(Gated(), variables, IMAGES)  # Not quantized, not calibrated.
    assert any("'logistic' in Gated" in reason for reason in found.obstacles)
    assert all(row.input_range is None for row in found.layers)
    assert [row.layer.path for row in found.layers if row.layer.float_reason is None] == [
        "conv",
        "gated",
        "head",
    ]


@pytest.mark.slow
def test_a_model_that_can_be_converted_has_no_obstacle():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
            return nn.Dense(5, name="head")(x.mean((1, 2)))

    variables = Plain().init(jax.random.key(0), IMAGES)
    shapes = jax.eval_shape(lambda: variables)  # Nothing is computed.
    found = jaxqat.describe(Plain(), shapes, IMAGES)
    assert found.obstacles == ()
    network = jaxqat.calibrate(Plain(), variables, batches=[IMAGES])
    assert jaxqat.convert(network, IMAGES).output_shape == (5,)


def test_functions_and_nnx_modules_have_the_same_table(variables):
    by_module = jaxqat.describe(Gated(), variables, IMAGES)
    function = lambda params, x: Gated().apply({"params": params}, x)  # noqa: E731
    by_function = jaxqat.describe(function, {"params": variables["params"]}, IMAGES)
    assert str(by_function).splitlines()[:6] == str(by_module).splitlines()[:6]
    linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    (row,) = jaxqat.describe(linear, IMAGES).layers
    assert (row.layer.macs, row.weight_bytes) == (2 * 8 * 8 * 3 * 4, 3 * 4)
    model = jaxqat.quantize(linear)
    model.calibrate(IMAGES)
    assert jaxqat.describe(model, IMAGES).layers[0].input_range == (1.0, 1.0)
