"""Reasons name the module: layer norm and attention as a whole, in Linen as in NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqat
from jaxqat.integer._convert.convert import obstacles

ROWS = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)


def running(x):
    return jnp.cumsum(x, -1)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x)
        x = nn.Dense(8, name="second")(nn.LayerNorm(name="norm")(x))
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(5, name="head")(nn.gelu(nn.Dense(8, name="third")(x)))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), running)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.second(self.norm(self.first(x)))
        return self.head(self.mlp(self.attention(x)))


def linen_reasons():
    model = jaxqat.quantize(LinenBlock(), "int8")
    return obstacles(model, without_data(model), ROWS)


def without_data(model):
    """Variables whose ranges have seen nothing."""
    return model.init_quant(model.init(jax.random.key(0), ROWS), ROWS)


def nnx_model(module):
    model = jaxqat.quantize(module, "int8")
    model.calibrate(ROWS)
    model.eval()
    return model


def reason(reasons, layer):
    (found,) = [text for text in reasons if text.startswith(f"{layer}:")]
    return found


@pytest.mark.parametrize("top", ["LinenBlock/", ""], ids=["linen", "nnx"])
def test_layer_norm_and_attention_are_blamed_by_their_names(top):
    found = linen_reasons() if top else obstacles(nnx_model(NNXBlock(nnx.Rngs(0))), ROWS)
    assert f"the normalization {top}norm before it" in reason(found, "second/input")
    assert f"a product of two activations ({top}attention) before it" in reason(
        found, "attention/out/input"
    )


def test_operations_of_nnx_modules_are_blamed_with_their_module():
    found = obstacles(nnx_model(NNXBlock(nnx.Rngs(0))), ROWS)
    assert " in mlp before it" in reason(found, "head/input")


def test_a_function_with_a_derivative_of_its_own_is_blamed_by_its_name():
    @jax.custom_jvp
    def bend(x):
        return jnp.cumsum(x, -1)

    bend.defjvp(lambda x, t: (bend(*x), bend(*t)))
    params = {"in": np.ones((8, 8), np.float32), "out": np.ones((8, 8), np.float32)}
    model = jaxqat.quantize(lambda p, x: bend(x @ p["in"]) @ p["out"])
    found = jaxqat.describe(model, {"params": params}, ROWS).obstacles
    assert "'bend' before it" in reason(found, "out/input")


def test_products_of_two_activations_are_named_by_their_nnx_module():
    recipe = jaxqat.Recipe(rules=(jaxqat.Rule(path="attention/.*", kind="attention"),))
    model = jaxqat.quantize(NNXBlock(nnx.Rngs(0)), recipe)
    kinds = {info.path: info.kind for info in model.layers(ROWS)}
    pairs = [path for path, kind in kinds.items() if kind == "attention"]
    assert len(pairs) == 2 and all(path.startswith("attention/") for path in pairs)


class Shared(nnx.Module):
    """One module at two places, called inside of another one, and again by a compiled function."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.inner = nnx.Sequential(self.norm, nnx.Linear(8, 8, rngs=rngs))
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        assert isinstance(self.norm, nnx.LayerNorm) and type(self.norm).__name__ == "LayerNorm"
        x = self.inner(x)
        return self.head(nnx.jit(lambda norm, x: norm(x))(self.norm, x))


def test_names_leave_the_given_module_its_state_and_its_results_as_they_are():
    module = Shared(nnx.Rngs(0))
    classes = [type(inner) for _, inner in nnx.iter_modules(module)]
    model = jaxqat.quantize(module, jaxqat.Recipe(weight_bits=None, act_bits=None))
    model.train()
    # Compiled in other pieces; two layer norms and two products of 8 numbers round in float32.
    np.testing.assert_allclose(model(ROWS), module(ROWS), rtol=1e-5, atol=1e-5)
    assert [type(inner) for _, inner in nnx.iter_modules(module)] == classes
    assert [type(inner) for _, inner in nnx.iter_modules(model.module)] == classes


def test_a_module_that_others_call_has_its_whole_path():
    found = obstacles(nnx_model(Shared(nnx.Rngs(0))), ROWS)
    # The first of its places names it, also where it is called from another one.
    for layer in ("inner/layers/1/input", "head/input"):
        assert "the normalization inner/layers/0 before it" in reason(found, layer)


def test_a_softmax_is_named_and_another_maximum_is_not():
    def with_softmax(params, x):
        return jax.nn.softmax(x @ params) @ params

    def with_maximum(params, x):
        x = x @ params
        return (x - x.max(-1, keepdims=True)) @ params

    variables = {"params": np.eye(8, dtype=np.float32)}
    for function, wanted in ((with_softmax, "a softmax"), (with_maximum, "'reduce_max'")):
        network = jaxqat.calibrate(function, variables, batches=[ROWS])
        (found,) = (text for text in obstacles(network, ROWS) if "before it" in text)
        assert f": {wanted} before it has no integer form" in found


def test_a_module_that_computes_a_root_among_its_layers_is_no_normalization():
    class Root(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="first")(x)
            return nn.Dense(5, name="head")(jnp.cumsum(x, -1) * jax.lax.rsqrt(jnp.exp(x)))

    model = jaxqat.quantize(Root(), "int8")
    found = obstacles(model, without_data(model), ROWS)
    assert reason(found, "head/input").startswith("head/input: 'cumsum' in Root before it")
