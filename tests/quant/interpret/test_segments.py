"""Training that keeps codes alone: the same step to the last bit, from fewer bytes."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqat
from jaxqat.quant._interpret.segments import segments_of
from jaxqat.quant._models.compiled import planner_of

pytestmark = pytest.mark.slow

X = np.random.default_rng(0).normal(size=(8, 8, 8, 4)).astype(np.float32)


class Residual(nn.Module):
    """Convolutions with batch norm, a residual addition, dropout, pools and a head."""

    @nn.compact
    def __call__(self, x, train: bool):
        def normalized(x):
            return nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x))

        x = nn.relu(normalized(x))
        x = nn.relu(normalized(nn.relu(normalized(x))) + x)
        x = nn.max_pool(nn.relu(normalized(x)), (2, 2), (2, 2))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Dense(5)(x.mean((1, 2)))


class Recurrent(nn.Module):
    """Iterations of a loop share their ranges."""

    @nn.compact
    def __call__(self, x, train: bool):
        del train
        x = nn.relu(nn.Dense(8)(x.reshape(8, 8, 32)))
        return nn.Dense(5)(jnp.asarray(nn.RNN(nn.SimpleCell(8))(x))[:, -1])


class Normed(nn.Module):
    """A float island between two convolutions."""

    @nn.compact
    def __call__(self, x, train: bool):
        del train
        x = nn.gelu(nn.LayerNorm()(nn.relu(nn.Conv(8, (3, 3))(x))))
        return nn.Dense(5)(nn.Conv(8, (3, 3))(x).mean((1, 2)))


def prepared(module, recipe, memory):
    variables = module.init(jax.random.key(0), X, train=False)
    model = jaxqat.quantize(module, recipe, memory=memory)
    return model, model.calibrate(variables, X, train=False)


def loss_of(module, recipe, memory):
    """The loss of a step as a function of what is trained, with all that it updates."""
    model, variables = prepared(module, recipe, memory)
    moving = [name for name in variables if name not in ("params", "quant_params")]

    def loss(trained, x):
        result, updates = model.apply(
            {**variables, **trained},
            x,
            train=True,
            mutable=moving,
            rngs={"dropout": jax.random.key(1)},
        )
        return jnp.sum(jnp.sin(result)), (result, updates)

    return loss, {k: v for k, v in variables.items() if k not in moving}


def steps(module, recipe):
    """Loss, gradients and updates of a step, of both kinds of memory."""
    for memory in ("values", "codes"):
        loss, trained = loss_of(module, recipe, memory)
        yield jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(trained, X)


@pytest.mark.parametrize("module", [Residual(), Normed()], ids=["residual", "normed"])
def test_loss_gradients_and_updates_are_those_of_the_plain_step(module):
    jax.tree.map(np.testing.assert_array_equal, *steps(module, "int8"))


@pytest.mark.parametrize(
    ("module", "recipe"),
    [
        pytest.param(Residual(), "w4a4_lsq", id="residual-lsq"),
        pytest.param(Recurrent(), "int8", id="recurrent-int8", marks=pytest.mark.long),
        pytest.param(Recurrent(), "w4a4_lsq", id="recurrent-lsq"),
    ],
)
def test_gradients_of_learned_scales_and_loops_differ_by_the_rounding_of_float32(module, recipe):
    ((loss, plain), gradients), ((other, same), found) = steps(module, recipe)
    jax.tree.map(np.testing.assert_array_equal, (loss, plain), (other, same))

    def check(one, another):
        # Sums of at most 2**12 products, added in another order: at most 2**12 roundings.
        np.testing.assert_allclose(another, one, rtol=0, atol=2**-12 * np.abs(one).max())

    jax.tree.map(check, gradients, found)


def test_the_backward_pass_of_a_cnn_keeps_codes_and_no_float_tensor():
    def kept(memory):
        loss, trained = loss_of(Residual(), "int8", memory)
        _, backward = jax.vjp(lambda t: loss(t, X)[0], trained)
        found = [x for x in jax.tree.leaves(backward) if x.shape[:1] == X.shape[:1] and x.ndim > 2]
        return sorted((x.dtype.name, x.shape[-1]) for x in found)

    # What the four convolutions read; the images are the caller's.
    assert kept("codes") == [("float32", 4), ("int8", 4), *[("int8", 8)] * 3]
    assert sum(dtype == "float32" for dtype, _ in kept("values")) > 4


def test_a_program_is_cut_at_each_quantized_tensor_that_alone_crosses():
    model, variables = prepared(Residual(), "int8", "codes")
    bound = model.bind(variables, train=False)
    call = bound._call((X,))
    plan = planner_of(bound.function, call, bound.recipe, "codes").planned(call.flat).plan
    found = segments_of(plan)
    assert len(found) >= 5  # One for each product at least.
    nodes = [node for segment in found for node in segment.nodes]
    assert len(set(nodes)) == len(nodes)
    read = {n for segment in found for n in segment.reads}
    assert read and all(n in plan.tensors for n in read)


def test_nnx_modules_and_functions_take_it_too():
    module = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    x, results = X[:, 0, 0], []
    for memory in ("values", "codes"):
        model = jaxqat.quantize(module, "int8", memory=memory)
        model.calibrate(x)
        results.append(nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model)["module"])
    jax.tree.map(np.testing.assert_array_equal, *map(nnx.to_pure_dict, results))


def test_another_name_is_refused():
    with pytest.raises(jaxqat.JaxqatError, match="memory must be 'values' or 'codes', got 'int8'"):
        jaxqat.quantize(Residual(), "int8", memory=cast(Any, "int8"))
