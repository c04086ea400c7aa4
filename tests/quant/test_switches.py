"""Layers switched off in one compiled program, against models that are quantized so by rules."""

import functools

import jax
import numpy as np
import pytest
from integer.models import MODELS, inputs, trained

from jaxqat import Recipe, Rule

pytestmark = pytest.mark.slow

NAMES = ("residual", "inception", "pre-activation")
IMAGES = inputs(4, seed=1)

# The tensor that this layer alone reads goes around it to a sum: of rules, it is rounded there by
# itself; of switches it stays as it is.
DIFFERENT = {
    ("residual", ("stem", "conv2", "project", "head")),
    # The result of `stem` is a term of a sum that is off. Of switches it is a real number then, not
    # an accumulator, and the codes made of it differ near ties: 1 of 1,536.
    ("pre-activation", ("stem", "conv1", "head")),
}


@functools.cache
def switched(name):
    """A quantized model, its layers, and its result for switches, which is compiled once."""
    model = trained(MODELS[name])
    table = model.model.layers(model.variables, IMAGES, train=False)

    traces = []

    @jax.jit
    def run(variables, switches, images):
        traces.append(switches)
        return model.model.switched(switches, variables, images, train=False).results[0]

    def result(on):
        switches = {row.path: np.bool_(row.path in on) for row in table}
        return np.asarray(run(model.variables, switches, IMAGES))

    return model, [row.path for row in table], result, traces


@functools.cache
def quantized_by_rules(name, on):
    """The result of the model of which a recipe quantizes those layers alone."""
    rules = (*(Rule(path=path) for path in on), Rule(weight_bits=None, act_bits=None))
    model = trained(MODELS[name], Recipe(rules=rules))
    return np.asarray(
        jax.jit(functools.partial(model.model.apply, train=False))(model.variables, IMAGES)
    )


@pytest.mark.parametrize("name", NAMES)
def test_with_all_layers_on_the_logits_are_the_quantized_models(name):
    model, paths, result, _ = switched(name)
    np.testing.assert_array_equal(result(paths), model(IMAGES)[1])


@pytest.mark.parametrize("name", NAMES)
def test_with_all_layers_off_the_logits_are_the_float_models(name):
    model, _, result, _ = switched(name)
    variables = {k: v for k, v in model.variables.items() if k != "quant"}
    expected = jax.jit(functools.partial(model.model.module.apply, train=False))(variables, IMAGES)
    # Two programs: they may contract multiply-adds differently, some units of 2**-23 in the end.
    tolerance = 2**-20 * np.abs(expected).max()
    np.testing.assert_allclose(result([]), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_switched_layer_is_what_a_rule_makes_of_it(name):
    _, paths, result, traces = switched(name)
    # Parts in float differ by the roundings of two programs, some units of 2**-23; that a layer is
    # on or off by hundreds of thousands of them.
    tolerance = 2**-20 * np.abs(result([])).max()
    seen = []
    for path in paths:
        for on in ((path,), tuple(p for p in paths if p != path)):
            actual = result(on)
            if (name, on) not in DIFFERENT:
                np.testing.assert_allclose(
                    actual, quantized_by_rules(name, on), rtol=0, atol=tolerance, err_msg=str(on)
                )
            assert all(np.abs(actual - other).max() > 100 * tolerance for other in seen)
            seen.append(actual)
    assert len(traces) == 1  # One program for all of them.
