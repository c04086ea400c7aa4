"""Nothing depends on JAX's settings for promotion of types and ranks, not a single bit."""

import contextlib
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plain import others_long

import jaxqat
from jaxqat import Recipe, Rule

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(0.5, 1, size=(4, 6, 6, 4)).astype(np.float32)
ROWS = RNG.normal(0.5, 1, size=(6, 8)).astype(np.float32)
TOKENS = RNG.integers(0, 10, size=(3, 5))
PARAMS = {name: RNG.normal(0, 0.3, (8, 8)).astype(np.float32) for name in ("q", "k", "v", "out")}


def perceptron(params, x):
    return jax.nn.relu(x @ params["q"]) @ params["out"]


def attention(params, x):
    q, k, v = (x @ params[name] for name in ("q", "k", "v"))
    return jax.nn.softmax(jnp.einsum("id,jd->ij", q, k)) @ v @ params["out"]


class Residual(nn.Module):
    """Batch norm, a projected shortcut, both kinds of pools, dropout."""

    @nn.compact
    def __call__(self, x, train):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train)(x)

        y = nn.relu(norm(nn.Conv(4, (3, 3), use_bias=False)(x)))
        y = nn.relu(norm(nn.Conv(6, (3, 3))(y)) + nn.Conv(6, (1, 1))(x))
        y = nn.max_pool(y, (2, 2), (2, 2))
        # `nn.avg_pool` divides by an integer, which strict promotion refuses.
        y = jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID") / 4.0
        y = nn.Dropout(0.5, deterministic=not train)(y)
        return nn.Dense(5)(y.mean((1, 2)))


class Words(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(5)(nn.Embed(10, 8)(tokens))


class Vision(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def flags(train) -> dict[str, Any]:
    return {"train": train}


def no_flags(train) -> dict[str, Any]:
    del train
    return {}


def linen(module, inputs, recipe, flags=no_flags):
    model = jaxqat.quantize(module, recipe)
    variables = module.init(jax.random.key(0), inputs, **flags(False))
    return model, dict(model.calibrate(variables, inputs, **flags(False))), inputs, flags


def function(model, inputs, recipe):
    quantized = jaxqat.quantize(model, recipe)
    params = model if isinstance(model, eqx.Module) else PARAMS
    variables = quantized.calibrate({"params": params}, inputs)
    return quantized, variables, inputs, no_flags


def equinox():
    keys = jax.random.split(jax.random.key(0), 2)
    layers = [eqx.nn.Linear(8, 6, key=keys[0]), eqx.nn.Lambda(jax.nn.relu)]
    return eqx.nn.Sequential([*layers, eqx.nn.Linear(6, 5, key=keys[1])])


RECIPES: dict[str, Any] = {name: name for name in ("int8", "int8_symmetric", "w4a4_lsq")} | {
    "dynamic": "int8_dynamic",
    "pact": Recipe(act_range="pact"),
    "mse": Recipe(act_range="mse", weight_range="mse"),
    "snr": Recipe(act_range="snr", weight_range="snr"),
    "percentile": Recipe(act_range="percentile", weight_range="percentile"),
    "groups": Recipe(weight_granularity="per_group", group_size=4),
    "stochastic": Recipe(rounding="stochastic"),
}
PAIRS = Recipe(rules=(Rule(kind="attention"),))
CASES = {f"function {n}": (lambda r=r: function(perceptron, ROWS, r)) for n, r in RECIPES.items()}
CASES |= {
    "attention": lambda: function(attention, ROWS, PAIRS),
    "equinox": lambda: function(equinox(), ROWS, "int8"),
    "embeddings": lambda: linen(Words(), TOKENS, "int8"),
    "residual int8": lambda: linen(Residual(), IMAGES, "int8", flags),
    "residual w4a4_lsq": lambda: linen(Residual(), IMAGES, "w4a4_lsq", flags),
}
CONVERTED = {"function w4a4_lsq", "residual int8"}


def everything(case):
    """Return what one training step, inference and the integer network compute."""
    model, variables, inputs, flags = CASES[case]()
    trained = {n: variables[n] for n in ("params", "quant_params") if n in variables}
    rest = {n: v for n, v in variables.items() if n not in trained}
    arrays, static = eqx.partition(trained, eqx.is_array)

    @jax.jit(compiler_options={"xla_backend_optimization_level": 0})
    def step(arrays):
        def loss(arrays):
            whole = {**rest, **eqx.combine(arrays, static)}
            rngs: Any = {"rngs": {"dropout": jax.random.key(1)}} if flags(True) else {}
            result, updates = model.apply(whole, inputs, mutable=list(rest), **flags(True), **rngs)
            return jnp.sum(jnp.square(result)), updates

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    found = [rest, step(arrays), model.apply(variables, inputs, **flags(False))]
    if case in CONVERTED:
        graph = jaxqat.convert(model, variables, inputs, **flags(False))
        found.append(jaxqat.make_executor(graph)(inputs))
        check = jaxqat.verify(model, variables, graph=graph, batches=[inputs], **flags(False))
        assert check.failures == () and check.differing == 0
        jaxqat.describe(model, variables, inputs, **flags(False))
    return found


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


# One of each kind of model, and of each kind of range.
PLAIN = (
    *("function int8", "function w4a4_lsq", "function dynamic", "function snr", "function groups"),
    *("attention", "equinox", "embeddings", "residual int8"),
)


@pytest.mark.parametrize("case", others_long(CASES, PLAIN))
def test_results_gradients_and_integer_networks_are_the_same_under_strict_promotion(case):
    expected = everything(case)
    with strict():
        found = everything(case)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def nnx_results():
    model = jaxqat.quantize(Vision(nnx.Rngs(0)), "int8")
    model.calibrate(IMAGES)

    def loss(model):
        return jnp.sum(jnp.square(model(IMAGES)))

    value, gradients = nnx.value_and_grad(loss)(model)
    model.eval()
    graph = jaxqat.convert(model, IMAGES)
    assert jaxqat.verify(model, graph=graph, batches=[IMAGES]).differing == 0
    return [value, nnx.to_pure_dict(gradients), model(IMAGES), jaxqat.make_executor(graph)(IMAGES)]


def test_an_nnx_module_trains_and_converts_to_the_same_bits_under_strict_promotion():
    expected = nnx_results()
    with strict():
        found = nnx_results()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_analysis_and_exported_programs_run_under_strict_promotion(tmp_path):
    with strict():
        network = jaxqat.calibrate(perceptron, {"params": PARAMS}, batches=[ROWS])
        found = jaxqat.analyze(network, batches=[ROWS], labels=[np.zeros(len(ROWS), int)])
        graph = jaxqat.convert(network, ROWS)
        path = tmp_path / "network.bin"
        jaxqat.export_stablehlo(graph, path, platforms=("cpu",))
        result = jaxqat.load_stablehlo(path)(ROWS)
    np.testing.assert_array_equal(result, network(ROWS))
    assert len(found.layers) == 2


def test_a_model_that_promotes_implicitly_is_still_refused():
    def mixed(params, x):
        return perceptron(params, x) * jnp.arange(8)

    with strict(), pytest.raises((ValueError, TypeError), match="promotion"):
        jaxqat.calibrate(mixed, {"params": PARAMS}, batches=[ROWS])
