"""Derivatives of quantized models: first ones are straight-through, others are refused."""

import jax
import numpy as np
import pytest

import jaxqat
from jaxqat import QuantizationError, Recipe

pytestmark = pytest.mark.slow

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
TOKENS = np.arange(8) % 5


def kernel(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def dense(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def embedded(params, tokens):
    return params["table"]["embedding"][tokens] @ params["b"]["kernel"]


LSQ = Recipe(act_range="lsq", weight_range="lsq")
CASES = {
    "dense": (dense, {"a": {"kernel": kernel(6, 4)}, "b": {"kernel": kernel(4, 3)}}, X, "int8"),
    "lsq": (dense, {"a": {"kernel": kernel(6, 4)}, "b": {"kernel": kernel(4, 3)}}, X, LSQ),
    "embedding": (
        embedded,
        {"table": {"embedding": kernel(5, 4)}, "b": {"kernel": kernel(4, 3)}},
        TOKENS,
        "int8",
    ),
}


def loss_of(case):
    function, params, x, recipe = CASES[case]
    network = jaxqat.calibrate(function, {"params": params}, batches=[x], recipe=recipe)
    return lambda params: (network.with_variables(params=params)(x) ** 2).sum(), params


def squared_gradient(loss):
    return lambda params: sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss)(params)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_refused_with_the_reason(case, compiled):
    loss, params = loss_of(case)
    loss = jax.jit(loss) if compiled else loss
    assert all(np.any(g) for g in jax.tree.leaves(jax.grad(loss)(params)))
    with pytest.raises(QuantizationError, match=r"Second derivatives .* are not defined"):
        jax.grad(squared_gradient(loss))(params)
    with pytest.raises(QuantizationError, match=r"Second derivatives .* are not defined"):
        jax.jacrev(jax.grad(loss))(params)


def test_second_derivatives_by_the_input_are_refused():
    function, params, x, _ = CASES["dense"]
    network = jaxqat.calibrate(function, {"params": params}, batches=[x])
    penalty = lambda x: (jax.grad(lambda x: network(x).sum())(x) ** 2).sum()  # noqa: E731
    with pytest.raises(QuantizationError, match=r"Second derivatives .* are not defined"):
        jax.grad(penalty)(x)


def test_gradients_of_what_follows_a_gradient_are_allowed_where_it_is_a_constant():
    loss, params = loss_of("dense")
    scale = np.float32(2.0)
    size = squared_gradient(loss)
    gradient = jax.grad(lambda scale: scale * size(params))(scale)
    # The derivative of a product by one factor is the other, to the bit.
    assert gradient == size(params)


@pytest.mark.parametrize("remat", [jax.checkpoint, lambda f: f], ids=["checkpoint", "plain"])
def test_rematerialization_is_no_second_derivative(remat):
    loss, params = loss_of("dense")
    expected = jax.grad(loss)(params)
    jax.tree.map(np.testing.assert_array_equal, jax.grad(remat(loss))(params), expected)


def test_forward_mode_is_refused_with_the_reason():
    loss, params = loss_of("dense")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(loss)(params)
