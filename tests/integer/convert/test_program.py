"""The program of a graph's arrays: what is left of a model's inference, and when it is computed."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqat
from jaxqat.integer._convert.program import ArraysProgram

WEIGHTS = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


@jax.custom_vjp
def _product(x, w):
    """A product that also returns something of its weights, as those of quantized layers do."""
    return x @ w, jnp.abs(w).max(0)


_product.defvjp(lambda x, w: (_product(x, w), None), lambda _, g: (None, None))


def _of_weights(divisor):
    @jax.jit
    def layer(x, w):
        y, largest = _product(x, w)
        return jax.nn.relu(y), largest / divisor(x)

    def function(parameters, examples):
        y, first = layer(examples[0], parameters[0])
        _, second = layer(y @ parameters[0].T, parameters[0])
        return [first, second + WEIGHTS[0]]

    return function


def _program(divisor, batch):
    shapes = (
        jax.ShapeDtypeStruct(WEIGHTS.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, 3), jnp.float32),
    )
    return ArraysProgram(_of_weights(divisor), [shapes[0]], [shapes[1]])


def test_what_only_the_models_results_need_is_left_out_also_within_calls():
    program = _program(lambda x: 127.0, 5)
    assert "dot_general" not in program.text and "5x" not in program.text
    # An input that no array depends on may be a shape.
    found = program([WEIGHTS], [jax.ShapeDtypeStruct((5, 3), jnp.float32)])
    wanted = np.abs(WEIGHTS).max(0) / np.float32(127)
    np.testing.assert_array_equal(found[0], wanted)
    np.testing.assert_array_equal(found[1], wanted + WEIGHTS[0])


def test_programs_for_other_batches_are_equal_unless_a_number_depends_on_the_batch():
    assert _program(lambda x: 127.0, 2).key == _program(lambda x: 127.0, 4).key
    assert _program(lambda x: x.shape[0], 2).key != _program(lambda x: x.shape[0], 4).key


def test_an_equal_program_is_not_compiled_again_and_computes_of_its_own_parameters():
    first, second = _program(lambda x: 127.0, 2), _program(lambda x: 127.0, 2)
    assert first._run is second._run
    example = [jax.ShapeDtypeStruct((2, 3), jnp.float32)]
    for program, weights in ((first, WEIGHTS), (second, 2 * WEIGHTS)):
        wanted = np.abs(weights).max(0) / np.float32(127)
        np.testing.assert_array_equal(program([weights], example)[0], wanted)
    for divisor in (1.0, 2.0, 3.0, 4.0):  # The oldest are forgotten.
        _program(lambda x, divisor=divisor: divisor, 2)
    assert _program(lambda x: 127.0, 2)._run is not first._run


DIFFERENT_CONSTANTS = """
import jax, numpy as np
from jaxqat.integer._convert.program import ArraysProgram

def program(seed):
    constant = np.random.default_rng(seed).normal(size=5000).astype(np.float32)

    def function(parameters):
        once = parameters[0] * constant
        return [once, jax.lax.scan(lambda a, _: (a * constant, None), once, length=3)[0]]

    return ArraysProgram(function, [jax.ShapeDtypeStruct((5000,), np.float32)]).key

assert program(0) == program(0) != program(1)
"""


@pytest.mark.parametrize("as_arguments", ["0", "1"])
def test_programs_that_differ_in_a_constant_differ(as_arguments):
    """Closed over or in a loop; JAX can make arguments of them, which are not in its text."""
    environment = {**os.environ, "JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS": as_arguments}
    subprocess.run([sys.executable, "-c", DIFFERENT_CONSTANTS], check=True, env=environment)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Conv(4, (3, 3))(x) + x)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.slow
def test_conversion_computes_the_arrays_once_for_both_batch_sizes(monkeypatch):
    images = np.random.default_rng(1).normal(size=(3, 6, 6, 2)).astype(np.float32)
    variables = Network().init(jax.random.key(0), images)
    network = jaxqat.calibrate(Network(), variables, batches=[images])
    calls, call = [], ArraysProgram.__call__

    def counted(self, *arguments):
        calls.append(self.text)
        return call(self, *arguments)

    monkeypatch.setattr(ArraysProgram, "__call__", counted)
    graph = jaxqat.convert(network, images)
    assert len(calls) == 1 and "i8>" in calls[0]  # The codes of the weights.
    assert "convolution" not in calls[0]
    check = jaxqat.verify(network, graph=graph, batches=[images])
    assert (check.differing, check.failures) == (0, ())
