"""Advice for a quantized network that is worse than its float one, on planted causes."""

import dataclasses
import io

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from sklearn.datasets import load_digits

import jaxqat
from jaxqat.pipeline.advice import advise, is_worse, print_advice
from jaxqat.pipeline.recipes import read_recipe
from jaxqat.quant import Recipe, Rule

FEATURES, OUTLIER = 1024, 3000.0


class Planted(nn.Module):
    """Random features of digits and a linear classifier, which reads one huge value too."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(FEATURES - 1, name="features")(x))
        x = nn.Dense(FEATURES - 1, name="middle")(x)
        x = jnp.concatenate([nn.relu(x), jnp.full_like(x[:, :1], OUTLIER)], axis=1)
        return nn.Dense(10, name="head")(x)


@pytest.fixture(scope="module")
def planted():
    """Model, variables, images and labels: the classifier is a least-squares fit."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images[:500] / 16).astype(np.float32), labels[:500]
    rng = np.random.default_rng(0)
    size = FEATURES - 1
    first = rng.normal(size=(64, size)).astype(np.float32) / 8
    hidden = np.maximum(images @ first, 0)
    ridge = hidden.T @ hidden + 1e-1 * np.eye(size)
    head = np.linalg.solve(ridge, hidden.T @ (np.eye(10)[labels] - 0.1))
    # The huge value has no weight, so that it changes no result in float.
    kernel = np.concatenate([head, np.zeros((1, 10))]).astype(np.float32)
    params = {
        "features": {"kernel": first, "bias": np.zeros(size, np.float32)},
        "middle": {"kernel": np.eye(size, dtype=np.float32), "bias": np.zeros(size, np.float32)},
        "head": {"kernel": kernel, "bias": np.zeros(10, np.float32)},
    }
    return Planted(), {"params": params}, images, labels


def analysis_of(planted, recipe):
    model, variables, images, labels = planted
    network = jaxqat.calibrate(model, variables, batches=[images], recipe=recipe)
    return jaxqat.analyze(network, batches=[images], labels=[labels])


@pytest.mark.slow
def test_the_advice_names_exactly_the_outlier_layer_and_its_recipe_repairs_it(planted, tmp_path):
    before = analysis_of(planted, Recipe())
    assert before.real.accuracy is not None and before.quantized.accuracy is not None
    assert is_worse(before.real.accuracy, before.quantized.accuracy)
    file = io.StringIO()
    print_advice(before, Recipe(), Console(file=file, width=200), "jaxqat quantize RUN")
    shown = file.getvalue()
    assert [line.split(":")[0] for line in shown.splitlines()[1:2]] == ["  head"]
    assert "outliers" in shown and "features" not in shown and "middle" not in shown
    assert "`jaxqat quantize RUN --recipe advice.yaml`" in shown

    path = tmp_path / "advice.yaml"  # As a person pastes it.
    path.write_text(shown[shown.index("quant:") :])
    recipe = read_recipe(str(path))
    assert recipe == Recipe(rules=(Rule(path="head", act_range="percentile"),))
    after = analysis_of(planted, recipe)
    assert after.quantized.accuracy is not None
    assert not is_worse(before.real.accuracy, after.quantized.accuracy)


@pytest.mark.slow
def test_a_layer_of_few_bits_gets_eight_and_keeps_what_its_rule_said(planted):
    rule = Rule(path="features", weight_bits=2, act_bits=2, weight_range="mse")
    recipe = Recipe(rules=(Rule(path="head", act_range="percentile"), rule))
    before = analysis_of(planted, recipe)
    advice = advise(before, recipe)
    assert list(advice.layers) == ["features"]
    better = dataclasses.replace(rule, weight_bits=8, act_bits=8)
    assert advice.recipe.rules == (better, recipe.rules[0])
    after = analysis_of(planted, advice.recipe).quantized.accuracy
    assert after is not None and before.quantized.accuracy is not None
    assert after > before.quantized.accuracy + 0.01


@pytest.mark.parametrize(("real", "quantized", "worse"), [(0.9, 0.89, False), (0.9, 0.88, True)])
def test_a_point_is_no_reason_for_advice_and_more_is(real, quantized, worse):
    assert is_worse(real, quantized) is worse
