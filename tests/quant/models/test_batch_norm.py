"""Re-estimated statistics of batch norm against NumPy, and what they are for."""

import functools
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import DenyList
from references.sqnr import decibels

import jaxqat
from jaxqat.errors import QuantizationError

pytestmark = pytest.mark.slow

# A batch's statistic is (s' - m s) / (1 - m) with s = 0. The momentum m is measured to some 2 units
# in the last place of 1, and 1 - m is 0.01 here: 2 * 6e-8 / 0.01, and rounding of s' itself.
RTOL = 2e-5


class Network(nn.Module):
    """Two convolutions with batch norm; the one between them always uses running statistics."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(8, (3, 3), name="conv1")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.99, name="bn1")(x)
        x = nn.BatchNorm(use_running_average=True, name="fixed")(nn.relu(x))
        x = nn.Conv(8, (3, 3), name="conv2")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn2")(x)
        return nn.Dense(10, name="head")(nn.relu(x).mean((1, 2)))


class NNXNetwork(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, momentum=0.99, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.bn(self.conv(x))).mean((1, 2)))


def batches(count=8, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(1, 3, (16, 8, 8, 3)).astype(np.float32) for _ in range(count)]


def network():
    """The network with initial statistics: mean 0, variance 1."""
    module = Network()
    return module, module.init(jax.random.key(0), batches(1)[0], train=False)


def seen_by(module, variables, name, images):
    """What a batch norm sees in training mode, in float64."""
    _, updates = module.apply(
        variables, images, train=True, capture_intermediates=True,
        mutable=["batch_stats", "intermediates"],
    )  # fmt: skip
    return np.asarray(updates["intermediates"][name]["__call__"][0], np.float64)


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jaxqat.BatchNormWarning)
        return jaxqat.reestimate_batch_norm(*args, **kwargs)


@pytest.mark.parametrize("bn, conv", [("bn1", "conv1"), ("bn2", "conv2")])
def test_the_statistics_are_the_means_over_the_batches_of_what_each_layer_sees(bn, conv):
    module, variables = network()
    new = quiet(module, variables, batches=batches(), train=True)
    values = [seen_by(module, variables, conv, images) for images in batches()]
    expected = {
        "mean": np.mean([x.mean((0, 1, 2)) for x in values], 0),
        "var": np.mean([x.var((0, 1, 2)) for x in values], 0),
    }
    deviation = np.sqrt(expected["var"]).max()
    for name, value in new["batch_stats"][bn].items():
        np.testing.assert_allclose(value, expected[name], rtol=RTOL, atol=RTOL * deviation)
    assert new["params"] is variables["params"]


def test_a_layer_with_fixed_statistics_keeps_them_to_the_bit():
    module, variables = network()
    fixed = {"mean": jnp.linspace(-1, 1, 8), "var": jnp.linspace(0.5, 2, 8)}
    variables = {**variables, "batch_stats": {**variables["batch_stats"], "fixed": fixed}}
    new = quiet(module, variables, batches=batches(3), train=True)
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"]["fixed"], fixed)


def test_an_nnx_module_gets_them_in_place_and_stays_in_its_mode():
    module = NNXNetwork()
    module.eval()
    assert quiet(module, batches=batches()) is module
    values = [np.asarray(module.conv(jnp.asarray(images)), np.float64) for images in batches()]
    mean = np.mean([x.mean((0, 1, 2)) for x in values], 0)
    var = np.mean([x.var((0, 1, 2)) for x in values], 0)
    atol = RTOL * np.sqrt(var).max()
    np.testing.assert_allclose(module.bn.mean[...], mean, rtol=RTOL, atol=atol)
    np.testing.assert_allclose(module.bn.var[...], var, rtol=RTOL)
    assert module.bn.use_running_average


def test_a_quantized_nnx_module_gets_them_and_its_ranges_stay():
    model = jaxqat.quantize(NNXNetwork())
    jaxqat.calibrate(model, batches=batches(2))
    before = nnx.state(model)
    quiet(model, batches=batches())
    after = nnx.state(model)
    jax.tree.map(np.testing.assert_array_equal, before["quant"], after["quant"])
    module: Any = model.module
    x = [np.asarray(module.conv(images), np.float64) for images in batches()]
    var = np.mean([values.var((0, 1, 2)) for values in x], 0)
    # Of a convolution of 8-bit codes: near the float one's, and not the same.
    assert 0 < np.abs(module.bn.var[...] / var - 1).max() < 0.02


def test_a_quantized_module_gets_those_of_its_integers_and_its_ranges_stay():
    module, variables = network()
    model = jaxqat.quantize(module)
    bound = jaxqat.calibrate(model, variables, batches=batches(2), train=False)
    new = quiet(model, bound.variables, batches=batches(1), train=True)
    assert new["quant"] is bound.variables["quant"]
    zeros = jax.tree.map(jnp.zeros_like, bound.variables["batch_stats"])
    zeros["fixed"] = bound.variables["batch_stats"]["fixed"]
    frozen = DenyList(("params", "quant"))
    _, updates = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=frozen))(
        {**bound.variables, "batch_stats": zeros}, batches(1)[0]
    )
    var = updates["batch_stats"]["bn1"]["var"] / (1 - 0.99)
    np.testing.assert_allclose(new["batch_stats"]["bn1"]["var"], var, rtol=RTOL)
    same = quiet(bound, batches=batches(1), train=True)
    jax.tree.map(np.testing.assert_array_equal, same.variables["batch_stats"], new["batch_stats"])


def test_unconverged_statistics_are_named_and_converged_ones_are_not():
    module, variables = network()
    with pytest.warns(jaxqat.BatchNormWarning, match=r"in bn1 \(8 of 8 .*\), bn2 \(8 of 8"):
        new = jaxqat.reestimate_batch_norm(module, variables, batches=batches(), train=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxqat.reestimate_batch_norm(module, new, batches=batches(seed=1), train=True)
    off = jax.tree.map(jnp.array, new["batch_stats"])
    off["bn2"]["var"] = off["bn2"]["var"].at[:3].multiply(2)
    with pytest.warns(jaxqat.BatchNormWarning, match=r"in bn2 \(3 of 8 channels\)\."):
        shifted = {**new, "batch_stats": off}
        jaxqat.reestimate_batch_norm(module, shifted, batches=batches(seed=1), train=True)


def test_running_averages_of_enough_steps_count_as_converged():
    """Momentum 0.9 over 100 batches, as at the end of a training run."""
    module, variables = network()
    step = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"])[1])
    for images in batches(800, seed=2):
        variables = {**variables, **step(variables, images)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxqat.reestimate_batch_norm(module, variables, batches=batches(), train=True)


def test_ranges_calibrated_on_new_statistics_fit_the_first_step_of_training():
    """With the initial statistics the activations of inference are thirty times too large."""
    module, variables = network()
    large = [10 * images for images in batches()]
    images = 10 * batches(1, seed=3)[0]
    exact, _ = module.apply(variables, images, train=True, mutable=["batch_stats"])

    def first_step(variables):
        model = jaxqat.quantize(module)
        bound = jaxqat.calibrate(model, variables, batches=large, train=False)
        logits, _ = model.apply(
            bound.variables, images, train=True, mutable=["batch_stats", "quant"]
        )
        return decibels(exact, logits)

    new = quiet(module, variables, batches=large, train=True)
    assert first_step(new) > first_step(variables) + 6  # One bit.


def test_what_cannot_be_estimated_raises_an_error():
    module, variables = network()
    with pytest.raises(QuantizationError, match=r"No running statistic changes .* train=True"):
        jaxqat.reestimate_batch_norm(module, variables, batches=batches(2), train=False)
    with pytest.raises(QuantizationError, match="no batch"):
        jaxqat.reestimate_batch_norm(module, variables, batches=[], train=True)
    dense = nn.Dense(3)
    params = dense.init(jax.random.key(0), jnp.zeros((1, 3)))
    with pytest.raises(QuantizationError, match="Dense has no running statistics"):
        jaxqat.reestimate_batch_norm(dense, params, batches=[np.zeros((2, 3), np.float32)])
    with pytest.raises(QuantizationError, match=r"of a Linen or an NNX module, .* got function"):
        jaxqat.reestimate_batch_norm(lambda x: x, batches=batches(1))
    bound = jaxqat.calibrate(NNXNetwork(), batches=batches(1))
    with pytest.raises(QuantizationError, match="pass the quantized module itself"):
        jaxqat.reestimate_batch_norm(bound, batches=batches(1))


def test_batches_without_statistics_are_refused_by_number():
    module, variables = network()
    good, bad = batches(1)[0], batches(1)[0].copy()
    bad[0, 0] = np.nan
    estimate = functools.partial(jaxqat.reestimate_batch_norm, module, variables, train=True)
    for number, given in ((1, [bad, good]), (2, [good, bad])):
        with pytest.raises(QuantizationError, match=rf"Batch {number} gives a '.*' that is not"):
            estimate(batches=given)
    with pytest.raises(QuantizationError, match=r"array of the shape .* pass \[array\]"):
        estimate(batches=good)


def test_a_batch_of_one_row_has_no_variance_and_is_refused():
    """Channels of one value: the variance of a single number is 0, and no layer's variance."""
    module = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    rows = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    variables = module.init(jax.random.key(0), rows)
    with pytest.raises(QuantizationError, match=r"variance of batch 2 is 0 .* of layers_1"):
        jaxqat.reestimate_batch_norm(module, variables, batches=[rows, rows[:1]])
    # A dead layer, all of whose values are zero, is no error.
    dead = {**variables, "params": jax.tree.map(jnp.zeros_like, variables["params"])}
    new = jaxqat.reestimate_batch_norm(module, dead, batches=[rows, rows])
    assert not np.any(new["batch_stats"]["layers_1"]["var"])


def test_a_statistic_that_is_no_running_average_raises_an_error():
    class Largest(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen = self.variable("batch_stats", "largest", jnp.zeros, (3,))
            seen.value = jnp.maximum(seen.value, jnp.abs(x).max(0))
            return x

    images = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    variables = Largest().init(jax.random.key(0), np.zeros((1, 3), np.float32))
    with pytest.raises(QuantizationError, match="'largest' does not follow a running average"):
        jaxqat.reestimate_batch_norm(Largest(), variables, batches=[images])


def test_a_call_in_training_mode_where_nothing_may_change_tells_what_to_pass():
    module, variables = network()
    images = batches(1)[0]
    bound = jaxqat.calibrate(module, variables, batches=[images], train=False)
    for call in (bound, lambda x, **kwargs: jaxqat.convert(bound, x, **kwargs)):
        with pytest.raises(QuantizationError, match=r'"mean" in "/bn1".*train=False or'):
            call(images, train=True)
