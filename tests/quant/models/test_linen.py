"""Quantized Linen modules: their collections, in training and in inference."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import jaxqat

RNG = np.random.default_rng(0)
ROWS = RNG.normal(2, 3, size=(32, 12)).astype(np.float32)
LABELS = RNG.integers(0, 5, 32)


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="out")(nn.relu(nn.Dense(16, name="in")(x)))


@pytest.mark.slow
def test_gradients_and_an_optimizer_train_parameters_and_learned_step_sizes_together():
    variables = Perceptron().init(jax.random.key(0), ROWS)
    model = jaxqat.quantize(Perceptron(), "w4a4_lsq")
    variables = model.calibrate(variables, ROWS)
    trained = {name: variables[name] for name in ("params", "quant_params")}
    optimizer = optax.adam(0.01)

    @jax.jit
    def update(trained, quant, state):
        def loss(trained):
            logits, updates = model.apply({**trained, "quant": quant}, ROWS, mutable=["quant"])
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
            return entropy.mean(), updates["quant"]

        (value, quant), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), quant, state, value

    quant, state, losses = variables["quant"], optimizer.init(trained), []
    before = jax.tree.map(np.asarray, trained)
    for _ in range(30):
        trained, quant, state, value = update(trained, quant, state)
        losses.append(float(value))
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    assert len(jax.tree.leaves(before["quant_params"])) == 4  # Two kernels, two tensors.
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(trained), strict=True):
        assert np.any(old != new)
    assert int(quant["in"]["input"]["count"]) == 31
    network = model.bind({**trained, "quant": quant})
    graph = jaxqat.convert(network, ROWS[:1])
    assert jaxqat.verify(network, graph=graph, batches=[ROWS]).differing == 0


class Modes(nn.Module):
    """Batch norm that trains whenever its statistics may change."""

    @nn.compact
    def __call__(self, x):
        train = self.is_mutable_collection("batch_stats")
        x = nn.Dense(16, name="in")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(5, name="out")(nn.relu(x))


class Flagged(nn.Module):
    """The same, with a flag."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16, name="in")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(5, name="out")(nn.relu(x))


def test_calibration_observes_inference_of_a_module_that_tells_training_by_mutability():
    variables: Any = Flagged().init(jax.random.key(0), ROWS, train=False)
    by_hand = jaxqat.calibrate(Flagged(), variables, batches=[ROWS], train=False)
    found = jaxqat.calibrate(Modes(), variables, batches=[ROWS])
    jax.tree.map(np.testing.assert_array_equal, found.variables, by_hand.variables)
    one_batch = jaxqat.quantize(Modes()).calibrate(variables, ROWS)
    training = jaxqat.quantize(Modes()).calibrate(variables, ROWS, mutable=["batch_stats"])
    expected, flag = variables["batch_stats"], jaxqat.quantize(Flagged())
    by_flag = flag.calibrate(variables, ROWS, mutable=["batch_stats"], train=True)
    for result, reference in ((one_batch, by_hand.variables), (training, by_flag)):
        for name in ("in", "out"):
            for end in ("min", "max"):
                # Compiled or not, the same float32 sums of 12 products and 32 rows.
                np.testing.assert_allclose(
                    result["quant"][name]["input"][end],
                    reference["quant"][name]["input"][end],
                    rtol=2**-18,
                )
        jax.tree.map(np.testing.assert_array_equal, result["batch_stats"], expected)
    # The statistics of this batch are far from those at the start, 0 and 1.
    high, other = (v["quant"]["out"]["input"]["max"] for v in (one_batch, training))
    assert float(high) > 2 * float(other)


def test_init_quant_makes_the_ranges_of_training_and_of_inference_alike():
    model, variables = jaxqat.quantize(Flagged()), Flagged().init(jax.random.key(0), ROWS, False)
    variables = [
        model.init_quant(variables, ROWS, mutable=train, train=train) for train in (False, True)
    ]
    assert set(variables[0]) == {"params", "batch_stats", "quant"}
    jax.tree.map(np.testing.assert_array_equal, *variables)
    assert set(variables[0]["quant"]) == {"in", "out"}
