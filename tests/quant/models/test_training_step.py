"""`jit_step` against `jax.jit`: the same codes, the same gradients, another program."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqat
from jaxqat.quant._models import training_step
from jaxqat.quant._numerics import cpu

pytestmark = pytest.mark.slow


class Network(nn.Module):
    """A convolution, a depthwise and a grouped one, a residual addition and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="first")(x))
        y = nn.relu(nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x))
        x = x + nn.Conv(16, (3, 3), feature_group_count=4, name="grouped")(y)
        return nn.Dense(10, name="head")(nn.relu(x).mean((1, 2)))


IMAGES = np.random.default_rng(0).normal(size=(8, 10, 10, 3)).astype(np.float32)


def calibrated(recipe):
    model = jaxqat.quantize(Network(), recipe)
    variables = Network().init(jax.random.key(0), IMAGES[:1])
    return model, model.calibrate(variables, IMAGES)


@pytest.fixture(scope="module")
def quantized():
    """The network in int8, and its variables."""
    return calibrated("int8")


def step_of(model):
    def loss(trained, others, x):
        logits, updates = model.apply({**trained, **others}, x, mutable=["quant"])
        return jnp.sum(jnp.square(logits)), (logits, updates)

    def step(variables, x):
        learned = ("params", "quant_params")
        trained = {name: value for name, value in variables.items() if name in learned}
        others = {name: value for name, value in variables.items() if name not in learned}
        gradients, (logits, updates) = jax.grad(loss, has_aux=True)(trained, others, x)
        return gradients, logits, updates

    return step


def operands_of_convolutions(text):
    """The element types of the first operands of convolutions, forward and backward."""
    return re.findall(r"stablehlo\.convolution.*: \(tensor<[^>]*x(\w+)>, tensor<", text)


@pytest.mark.parametrize(
    "recipe, units", [("int8", 0), ("int8", 1), ("int8_dynamic", 0), ("w4a4_lsq", 1)]
)
def test_a_quantized_model_computes_the_same_and_has_the_same_gradients(recipe, units, monkeypatch):
    monkeypatch.setattr(cpu, "has_matrix_units", lambda: bool(units))
    model, variables = calibrated(recipe)
    expected = jax.jit(step_of(model))(variables, IMAGES)
    actual = jaxqat.jit_step(step_of(model))(variables, IMAGES)
    for one, other in zip(jax.tree.leaves(expected[1:]), jax.tree.leaves(actual[1:]), strict=True):
        np.testing.assert_array_equal(one, other)
    # Gradients are float sums in another order: at most some 1,000 roundings of 2**-24.
    for one, other in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(actual[0]), strict=True):
        largest = np.abs(np.asarray(one)).max()
        assert largest > 0
        np.testing.assert_allclose(other, one, rtol=0, atol=largest * 2**-14)


@pytest.mark.parametrize("units", [False, True], ids=["float", "matrix units"])
def test_no_convolution_of_codes_has_operands_of_8_bits(quantized, units, monkeypatch):
    monkeypatch.setattr(cpu, "has_matrix_units", lambda: units)
    model, variables = quantized
    usual = operands_of_convolutions(jax.jit(step_of(model)).lower(variables, IMAGES).as_text())
    fast = operands_of_convolutions(
        jaxqat.jit_step(step_of(model)).lower(variables, IMAGES).as_text()
    )
    assert "i8" in usual and set(fast) == {"f32"}


def test_what_convolutions_read_is_stored_in_the_compiled_program(quantized):
    def barriers(model, variables):
        text = jaxqat.jit_step(step_of(model)).lower(variables, IMAGES).compile().as_text()
        return [line for line in text.splitlines() if " opt-barrier(" in line]

    model, variables = quantized
    # The codes that 4 products read, and those of the two terms of the sum.
    assert sum("s8[" in line for line in barriers(model, variables)) == 6
    # A float network: what 3 convolutions read.
    assert len(barriers(Network(), {"params": variables["params"]})) >= 3


def test_only_float_networks_are_traced_with_barriers_before_layers(quantized):
    seen = []

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen.append(cpu.is_active())
            return nn.Dense(4)(x)

    rows = np.ones((2, 3), np.float32)
    variables = Layer().init(jax.random.key(0), rows)
    model = jaxqat.quantize(Layer(), "int8")
    bound = model.calibrate(variables, rows)
    seen.clear()
    with training_step.fast_on_cpu():
        jaxqat.quantize(Layer(), "int8").apply(bound, rows)
        assert not any(seen)
        Layer().apply(variables, rows)
        assert seen[-1]


def test_options_of_jit_are_kept():
    step = jaxqat.jit_step(
        lambda x, n: x * n, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
    )
    assert step(jnp.float32(2), 3) == 6
    with pytest.raises(ValueError, match="static"):
        step(jnp.float32(2), np.ones(3))


def test_a_jaxlib_without_the_options_compiles_in_the_usual_way_and_says_so(monkeypatch):
    monkeypatch.setattr(training_step.cpu, "OPTIONS", {"xla_no_such_option": "1"})
    training_step.is_supported.cache_clear()
    try:
        with pytest.warns(jaxqat.StepWarning, match="no compiler options xla_no_such_option"):
            step = jaxqat.jit_step(lambda x: x + 1)
        assert step(1.0) == 2
    finally:
        training_step.is_supported.cache_clear()
