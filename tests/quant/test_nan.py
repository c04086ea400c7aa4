"""A NaN gets the code of zero wherever real values become codes, and is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqat

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
ROWS = RNG.normal(1, 2, size=(16, 12)).astype(np.float32)
WITH_NAN, ZEROS = ROWS.copy(), ROWS.copy()
WITH_NAN[3, 4], ZEROS[3, 4] = np.nan, 0.0
PARAMS = {
    "first": RNG.normal(0, 0.3, (12, 8)).astype(np.float32),
    "last": RNG.normal(0, 0.3, (8, 4)).astype(np.float32),
}
RECIPES = ["int8", "int8_symmetric", "w4a4_lsq", "pact", "w2a2_lsq"]


def recipe(name):
    return jaxqat.Recipe(act_range="pact") if name == "pact" else name


def perceptron(params, x, y=None):
    del y
    return jax.nn.relu(x @ params["first"]) @ params["last"]


def joined(params, x, y):
    """The maxima of pairs of a tensor of real values and one of codes."""
    both = jnp.concatenate([y[:, :8], jax.nn.relu(x @ params["first"])], 1)
    pairs = jax.lax.reduce_window(both, -jnp.inf, jax.lax.max, (1, 2), (1, 2), "VALID")
    return pairs @ params["last"]


def signs(params, x):
    """The signs of a layer's results by division: that of zero is NaN."""
    values = x @ params["first"]
    return values / jnp.abs(values) @ params["last"]


def calibrated(model, name="int8"):
    batches = [(ROWS, ROWS)]
    return jaxqat.calibrate(model, {"params": PARAMS}, batches=batches, recipe=recipe(name))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("model", [perceptron, joined])
def test_frozen_evaluation_takes_a_nan_for_zero(model, name):
    network = calibrated(model, name)
    found, wanted = network.codes(WITH_NAN, WITH_NAN), network.codes(ZEROS, ZEROS)
    assert found.keys() == wanted.keys() and len(found) > 1
    for key in found:
        np.testing.assert_array_equal(found[key], wanted[key], err_msg=key)
    np.testing.assert_array_equal(network(WITH_NAN, WITH_NAN), network(ZEROS, ZEROS))


@pytest.mark.parametrize("name", RECIPES)
def test_the_code_of_a_nan_is_the_zero_point(name):
    network = calibrated(perceptron, name)
    found = network.record(WITH_NAN).codes["first", "input"]
    assert int(found.codes[3, 4]) == int(found.grid.zero)
    assert name != "int8" or int(found.grid.zero) != 0


def test_nan_made_inside_of_the_network_is_zero_as_well():
    network = jaxqat.calibrate(signs, {"params": PARAMS}, batches=[ROWS])
    evaluator = network.record(ROWS)
    argument = evaluator.codes["last", "argument"]
    zeros = int((argument.codes == argument.grid.zero).sum())  # 0 / |0| has no value.
    assert int(evaluator.nan_counts["last", "input"]) == zeros < 16
    evaluator = network.record(ZEROS * 0)
    found = evaluator.codes["last", "input"]
    assert (found.codes == found.grid.zero).all()
    assert int(evaluator.nan_counts["last", "input"]) == 16 * 8


def test_the_evaluation_counts_nan_by_tensor():
    network = calibrated(joined)
    counts = jax.jit(lambda x: network.record(x, x).nan_counts)(WITH_NAN)
    found = {"/".join(key): int(n) for key, n in counts.items()}
    assert found == {"first/input": 1, "last/input": 1}
    assert not any(int(n) for n in network.record(ROWS, ROWS).nan_counts.values())
    assert calibrated(perceptron).record(ROWS).nan_counts.keys() == {("first", "input")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_nan_in_the_input_leaves_no_nan_in_gradients(name):
    """As before the NaN had a code of its own: its element has the gradient 0."""
    network = calibrated(perceptron, name)
    model, state = network.model, network.variables

    def loss(trained, x):
        return jnp.sum(model.apply({**state, **trained}, x) ** 2)

    trained = {n: state[n] for n in ("params", "quant_params") if n in state}
    gradients, at_x = jax.grad(loss, argnums=(0, 1))(trained, jnp.asarray(WITH_NAN))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert at_x[3, 4] == 0 and np.isfinite(at_x).all()


@pytest.mark.parametrize("name", ["int8", "int8_symmetric", "pact"])
def test_training_shows_a_nan_in_its_ranges_and_then_in_its_result(name):
    """Each step makes the range of one more tensor NaN, up to the last layer's."""
    network = calibrated(perceptron, name)
    model, variables = network.model, network.variables
    for rows in (WITH_NAN, ROWS):
        _, updates = model.apply(variables, rows, mutable=["quant"])
        variables = {**variables, **updates}
    result, _ = model.apply(variables, ROWS, mutable=["quant"])
    if name == "pact":  # Its range does not move, and its bound is the optimizer's.
        assert np.isfinite(result).all()
    else:
        assert np.isnan(result).all()


def test_dynamic_ranges_show_a_nan_in_its_own_row():
    network = calibrated(perceptron, "int8_dynamic")
    result = np.asarray(network(WITH_NAN))
    assert np.isnan(result[3]).all() and np.isfinite(np.delete(result, 3, 0)).all()


def test_the_table_of_pixels_takes_a_nan_for_zero():
    def preprocess(images):
        return jnp.where(images == 7, jnp.nan, images.astype(jnp.float32) - 100)

    pixels = RNG.integers(0, 256, (16, 12)).astype(np.uint8)
    rows = np.asarray(pixels, np.float32) - 100
    network = jaxqat.calibrate(perceptron, {"params": PARAMS}, batches=[rows])
    graph = jaxqat.convert(network, rows[:1], preprocess=preprocess)
    zero, table = graph.tensors[graph.quantize.output].zero_point, graph.quantize.table
    assert zero != 0 and table is not None and (table[7] == zero).all()
