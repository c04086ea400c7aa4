"""Linen modules whose parameters are boxed with metadata for sharding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqat

ROWS = np.random.default_rng(0).normal(1, 2, size=(16, 12)).astype(np.float32)
BOXES = {"partitioning": nn.with_partitioning, "logical": nn.with_logical_partitioning}
BY_BOX = pytest.mark.parametrize("box", BOXES)


class Perceptron(nn.Module):
    """Two dense layers; `box` names what their kernels are boxed with, if with anything."""

    box: str | None = None

    @nn.compact
    def __call__(self, x):
        start: Any = nn.initializers.lecun_normal()
        if self.box is not None:
            start = BOXES[self.box](start, ("in", "out"))
        x = nn.relu(nn.Dense(16, kernel_init=start, name="first")(x))
        return nn.Dense(5, kernel_init=start, name="last")(x)


def is_box(leaf):
    return isinstance(leaf, nn.Partitioned)


@BY_BOX
@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_layers_and_ranges_have_the_paths_of_unboxed_parameters(box, recipe):
    plain, boxed = (jaxqat.quantize(Perceptron(b), recipe) for b in (None, box))
    expected, found = (m.init(jax.random.key(0), ROWS) for m in (plain, boxed))
    assert [x.path for x in boxed.layers(found, ROWS)] == ["first", "last"]
    names = [x.weight_path for x in boxed.layers(found, ROWS)]
    assert names == [("first", "kernel"), ("last", "kernel")]
    assert jax.tree.structure(nn.meta.unbox(found)) == jax.tree.structure(expected)


@pytest.mark.slow
@BY_BOX
def test_boxes_stay_in_what_init_calibrate_and_gradients_return(box):
    model = jaxqat.quantize(Perceptron(box), "int8")
    variables = model.calibrate(model.init(jax.random.key(0), ROWS), ROWS)

    def loss(params):
        return jnp.sum(model.apply({**variables, "params": params}, ROWS) ** 2)

    for params in (variables["params"], jax.grad(loss)(variables["params"])):
        kernel = params["last"]["kernel"]
        assert is_box(kernel) and kernel.names == ("in", "out")
        assert np.any(kernel.value) and not is_box(params["last"]["bias"])


@pytest.mark.slow
@BY_BOX
@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_boxed_and_unboxed_variables_give_the_same_codes_and_integer_network(box, recipe):
    model = jaxqat.quantize(Perceptron(box), recipe)
    variables = model.calibrate(model.init(jax.random.key(0), ROWS), ROWS)
    unboxed = nn.meta.unbox(variables)
    plain = jaxqat.quantize(Perceptron(), recipe)
    found, expected = model.codes(variables, ROWS), plain.codes(unboxed, ROWS)
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    _, updates = model.apply(variables, ROWS, mutable=["quant"])
    assert int(updates["quant"]["last"]["input"]["count"]) == 2
    graph = jaxqat.convert(model, variables, ROWS[:1])
    assert jaxqat.verify(plain, unboxed, graph=graph, batches=[ROWS]).differing == 0
