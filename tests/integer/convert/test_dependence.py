"""A network may depend on one image's values only: not on the batch, nor on other pixels."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxqat
from jaxqat import ConversionError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6)).astype(np.float32)
PARAMS = {
    name: {"kernel": RNG.normal(size=(6, 6)).astype(np.float32)} for name in ("first", "last")
}
IMAGES = RNG.integers(0, 256, (16, 4, 6), dtype=np.uint8)


def converted(function, x, **options):
    network = jaxqat.calibrate(function, {"params": PARAMS}, batches=[x])
    return jaxqat.convert(network, x, **options)


def divided(params, x):
    hidden = x @ params["first"]["kernel"] / x.shape[0]
    return jnp.maximum(hidden, 0) @ params["last"]["kernel"]


def shifted(params, x):
    hidden = x @ params["first"]["kernel"] + jnp.arange(6) / len(x)
    return jnp.maximum(hidden, 0) @ params["last"]["kernel"]


def scaled_result(params, x):
    return x @ params["first"]["kernel"] / len(x)


@pytest.mark.parametrize("function", [divided, shifted, scaled_result])
def test_a_network_of_the_batch_size_is_refused_with_the_node(function):
    expected = r"depends on the batch size: with 8 examples and with 16 .*\(.*first.*\)"
    with pytest.raises(ConversionError, match=expected):
        converted(function, X)


def test_a_model_that_drops_examples_is_refused():
    def first_of_batch(params, x):
        return jnp.maximum(x @ params["first"]["kernel"], 0)[:1] @ params["last"]["kernel"]

    with pytest.raises(ConversionError, match=r"slice: 'slice' mixes the examples of a batch"):
        converted(first_of_batch, X)
    expected = "depends on the batch size: it can be converted with 1 examples, but not with 2"
    with pytest.raises(ConversionError, match=expected) as error:
        converted(first_of_batch, X[:1], strict=True)
    assert any("'slice' changes the batch axis" in reason for reason in error.value.reasons)


def test_a_model_for_one_batch_size_is_converted():
    def fixed(params, x):
        return x.reshape(8, 6) @ params["first"]["kernel"]

    graph = converted(fixed, X)
    np.testing.assert_array_equal(jaxqat.make_executor(graph)(X).shape, (8, 6))


def network(params, x):
    return jnp.maximum(x @ params["first"]["kernel"], 0) @ params["last"]["kernel"]


def normalized(images):
    return images.astype(jnp.float32) / 255 * jnp.linspace(0.5, 2, 6) - 0.3


def standardized(images):
    x = images.astype(jnp.float32)
    return (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)


def centred(images):
    mean_image = 20 * jnp.sin(jnp.arange(24.0)).reshape(4, 6)
    return (images - mean_image) / 64


def mirrored(images):
    return normalized(images)[:, ::-1]


def of_the_batch(images):
    return normalized(images) - images.mean() / 255


@pytest.mark.parametrize("preprocess", [standardized, centred, mirrored, of_the_batch])
def test_a_preprocess_that_looks_further_than_one_value_is_refused(preprocess):
    with pytest.raises(ConversionError, match=r"preprocess must compute each value from .* alone"):
        converted(network, np.asarray(preprocess(IMAGES)), preprocess=preprocess)


@pytest.mark.parametrize("preprocess", [normalized, lambda x: x > 99, lambda x: x / 255])
def test_functions_of_a_value_and_its_channel_become_a_table(preprocess):
    x = np.asarray(preprocess(jnp.asarray(IMAGES)), np.float32)
    graph = converted(network, x, preprocess=preprocess)
    executor = jaxqat.make_executor(graph)
    np.testing.assert_array_equal(executor(IMAGES), executor(x))
