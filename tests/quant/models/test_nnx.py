"""NNX modules and Equinox modules, quantized as they are."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxqat

pytestmark = pytest.mark.slow

IMAGES = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
LABELS = np.arange(8) % 5


class Classifier(nnx.Module):
    """Batch norm, a list of layers, a residual addition, dropout."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.layers = nnx.List(
            [nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)]
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = y = nnx.relu(self.norm(self.conv(x)))
        for layer in self.layers:
            y = layer(y)
        return self.head(self.dropout(nnx.relu(x + y).mean((1, 2))))


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def state_of(module):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))


@pytest.fixture
def quantized():
    model = jaxqat.quantize(Classifier(nnx.Rngs(0)), "int8")
    model.calibrate(IMAGES)
    return model


def test_an_nnx_module_is_quantized_unchanged_under_its_own_paths(quantized):
    module = Classifier(nnx.Rngs(0))
    before = state_of(module)
    model = jaxqat.quantize(module, "int8")
    model.calibrate(IMAGES)
    model(IMAGES)
    jax.tree.map(np.testing.assert_array_equal, state_of(module), before)
    parameters = nnx.to_pure_dict(nnx.state(model.module, nnx.Param))
    jax.tree.map(
        np.testing.assert_array_equal, parameters, nnx.to_pure_dict(nnx.state(module, nnx.Param))
    )
    table = model.layers(IMAGES)
    assert [(info.path, info.kind, info.weight_bits) for info in table] == [
        ("conv", "conv", 8),
        ("layers/0", "conv", 8),
        ("head", "dense", 8),
    ]


def test_an_nnx_module_trains_under_nnx_jit_and_every_kernel_gets_a_gradient(quantized):
    optimizer = nnx.Optimizer(quantized, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: cross_entropy(model(IMAGES)))(model)
        optimizer.update(model, gradient)
        return loss, gradient

    ranges = jax.tree.map(np.asarray, quantized.quant.get_value())
    means = np.asarray(quantized.module.norm.mean[...])
    losses, gradients = zip(*(step(quantized, optimizer) for _ in range(20)), strict=True)
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(gradients[0]))
        if "kernel" in jax.tree_util.keystr(path)
    ]
    assert len(kernels) == 3
    assert all(np.abs(kernel).max() > 0 for kernel in kernels)
    after = quantized.quant.get_value()
    assert int(after["conv"]["input"]["count"]) == int(ranges["conv"]["input"]["count"]) + 20
    assert np.abs(np.asarray(quantized.module.norm.mean[...]) - means).max() > 0


def test_eval_freezes_ranges_and_statistics_as_in_any_nnx_module(quantized):
    quantized.eval()
    before = state_of(quantized)
    first, second = quantized(IMAGES), quantized(IMAGES)
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, state_of(quantized), before)


def test_an_nnx_module_becomes_the_integer_network_that_it_was_trained_as(quantized):
    quantized(IMAGES)
    quantized.eval()
    graph = jaxqat.convert(quantized, IMAGES[:1])
    check = jaxqat.verify(quantized, graph=graph, batches=[IMAGES])
    assert check.failures == ()
    assert (check.differing, check.codes > 8 * 8 * 8 * 8) == (0, True)
    logits = nnx.jit(lambda model: model(IMAGES))(quantized)
    np.testing.assert_array_equal(jaxqat.make_executor(graph)(IMAGES), logits)
    float_logits = quantized.module(IMAGES)
    assert np.linalg.norm(logits - float_logits) < 0.05 * np.linalg.norm(float_logits)


def test_a_module_in_training_mode_is_told_to_be_converted_as_in_inference(quantized):
    with pytest.raises(jaxqat.ConversionError, match=r"statistics of the batch.*`eval\(\)`"):
        jaxqat.convert(quantized, IMAGES)
    quantized.eval()
    assert jaxqat.convert(quantized, IMAGES).output_shape == (5,)


def test_an_nnx_module_without_ranges_says_how_to_get_them():
    with pytest.raises(jaxqat.QuantizationError, match=r"No activation ranges\. Call `calibrate`"):
        jaxqat.quantize(Classifier(nnx.Rngs(0)))(IMAGES)
    with pytest.raises(jaxqat.QuantizationError, match=r"No activation ranges\. Call `calibrate`"):
        jaxqat.convert(jaxqat.quantize(Classifier(nnx.Rngs(0))), IMAGES)


class Perceptron(eqx.Module):
    """Functions among the parameters, as Equinox modules have them."""

    layers: list
    activation: Any

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.layers = [eqx.nn.Linear(12, 16, key=first), eqx.nn.Linear(16, 5, key=second)]
        self.activation = jax.nn.relu

    def __call__(self, x):
        first, second = self.layers
        return second(self.activation(first(x)))


@pytest.fixture(scope="module")
def perceptron():
    module = Perceptron(jax.random.key(0))
    x = IMAGES.reshape(-1, 12)[:64]
    model = jaxqat.quantize(module)
    return module, model, model.calibrate({"params": module}, x), x


def test_an_equinox_module_is_mapped_over_its_batch_and_gets_gradients(perceptron):
    module, model, variables, x = perceptron
    expected = jax.vmap(module)(x)
    actual = model.apply(variables, x)
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)
    table = model.layers(variables, x)
    assert [(info.path, info.weight_bits) for info in table] == [("layers/0", 8), ("layers/1", 8)]

    @eqx.filter_grad
    def gradient(module):
        return jnp.sum(model.apply({**variables, "params": module}, x) ** 2)

    for layer in gradient(module).layers:
        assert np.abs(layer.weight).max() > 0


def test_an_equinox_convolution_gets_gradients(perceptron):
    module = eqx.nn.Conv2d(3, 6, 3, padding=1, key=jax.random.key(0))
    x = jnp.asarray(IMAGES.transpose(0, 3, 1, 2))
    model = jaxqat.quantize(module)
    variables = model.calibrate({"params": module}, x)
    expected = jax.vmap(module)(x)
    actual = model.apply(variables, x)
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)
    gradient = eqx.filter_grad(
        lambda module: jnp.sum(model.apply({**variables, "params": module}, x) ** 2)
    )(module)
    assert np.abs(gradient.weight).max() > 0


def test_an_equinox_module_has_an_integer_network(perceptron):
    """Mapped over a batch, its products come out transposed, with the bias added behind that."""
    _, model, variables, x = perceptron
    graph = jaxqat.convert(model, variables, x[:1], strict=True)
    check = jaxqat.verify(model, variables, graph=graph, batches=[x])
    assert (check.differing, check.failures) == (0, ())


def test_learned_steps_of_an_nnx_module_are_trained_by_its_optimizer():
    model = jaxqat.quantize(Classifier(nnx.Rngs(0)), "w4a4_lsq")
    model.calibrate(IMAGES)
    before = jax.tree.map(np.asarray, model.quant_params.get_value())
    assert len(jax.tree.leaves(before)) >= 5  # Of three weights, and of the tensors they read.
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: cross_entropy(model(IMAGES)))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(update(model, optimizer)) for _ in range(15)]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    after = model.quant_params.get_value()
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.any(a != b)
    model.eval()
    copy = jaxqat.quantize(model.module, "w4a4_lsq")
    copy.set_state(model.bind().state)
    copy.eval()
    np.testing.assert_array_equal(copy(IMAGES), model(IMAGES))
