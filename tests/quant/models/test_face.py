"""The same calls for every kind of model, and what they refuse."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqat
from jaxqat.quant._models.linen import QuantizedModule
from jaxqat.quant._models.nnx import QuantizedNNX
from jaxqat.quant._models.stateless import QuantizedEquinox, QuantizedFunction

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(24, 12)).astype(np.float32)
PARAMS = {
    name: {
        "kernel": jnp.asarray(RNG.normal(0, 0.4, shape), jnp.float32),
        "bias": jnp.asarray(RNG.normal(0, 0.1, shape[-1:]), jnp.float32),
    }
    for name, shape in {"first": (12, 16), "second": (16, 5)}.items()
}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="second")(nn.relu(nn.Dense(16, name="first")(x)))


class NNX(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(12, 16, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(16, 5, rngs=nnx.Rngs(0))
        for name, values in PARAMS.items():
            layer = getattr(self, name)
            layer.kernel[...], layer.bias[...] = values["kernel"], values["bias"]

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self):
        layers = {}
        for name, values in PARAMS.items():
            inputs, outputs = values["kernel"].shape
            layer = eqx.nn.Linear(inputs, outputs, key=jax.random.key(0))
            weights = values["kernel"].T, values["bias"]
            layers[name] = eqx.tree_at(lambda x: (x.weight, x.bias), layer, weights)
        self.first, self.second = layers["first"], layers["second"]

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


def function(params, x):
    first, second = params["first"], params["second"]
    return jax.nn.relu(x @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of the same network: the model, what precedes its inputs, its quantized class."""

    make: Callable[[], Any]
    state: tuple[Any, ...]
    quantized: type


KINDS = {
    "linen": Kind(Linen, ({"params": PARAMS},), QuantizedModule),
    "nnx": Kind(NNX, (), QuantizedNNX),
    "function": Kind(lambda: function, ({"params": PARAMS},), QuantizedFunction),
    "equinox": Kind(Equinox, (), QuantizedEquinox),
}
CONVERTIBLE = [name for name in KINDS if name != "equinox"]


@pytest.mark.parametrize("name", KINDS)
def test_calibrate_returns_a_bound_model_with_the_same_ranges_for_every_kind(name):
    kind = KINDS[name]
    network = jaxqat.calibrate(kind.make(), *kind.state, batches=[ROWS, ROWS])
    assert type(network) is jaxqat.BoundModel
    assert type(network.model) is kind.quantized
    layers = jaxqat.describe(network, ROWS).layers
    assert [(row.layer.path, row.layer.weight_bits, row.layer.act_bits) for row in layers] == [
        ("first", 8, 8),
        ("second", 8, 8),
    ]
    low, high = layers[0].input_range or (0, 0)
    # Zero lies on the grid, so each end is half a step off.
    np.testing.assert_allclose(
        [low, high], [ROWS.min(), ROWS.max()], atol=float(np.ptp(ROWS)) / 255
    )
    assert int(network.variables["quant"]["first"]["input"]["count"]) == 2
    assert repr(network).startswith(f"BoundModel({kind.quantized.__name__}, variables: params, ")
    expected = function(PARAMS, ROWS)
    error = np.linalg.norm(np.asarray(network(ROWS)) - expected)
    assert 0 < error < 0.02 * np.linalg.norm(expected)  # 8 bits, two layers.


@pytest.mark.parametrize("name", CONVERTIBLE)
@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_every_kind_becomes_the_same_integer_network_by_the_same_calls(name, recipe, tmp_path):
    def deployed(kind):
        network = jaxqat.calibrate(kind.make(), *kind.state, batches=[ROWS], recipe=recipe)
        table = str(jaxqat.describe(network, ROWS))
        graph = jaxqat.convert(network, ROWS[:1])
        check = jaxqat.verify(network, graph=graph, batches=[ROWS])
        assert check.failures == () and check.differing == 0
        path = jaxqat.export_onnx(graph, tmp_path / "net.onnx", overwrite=True)
        return table, network.codes(ROWS), np.asarray(network(ROWS)), graph, path.read_bytes()

    expected = deployed(KINDS["function"])
    actual = deployed(KINDS[name])
    assert actual[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, actual[1:3], expected[1:3])
    assert list(actual[3].tensors) == list(expected[3].tensors)
    parts = zip(
        (*actual[3].nodes, *actual[3].tensors.values()),
        (*expected[3].nodes, *expected[3].tensors.values()),
        strict=True,
    )
    for one, two in parts:
        assert type(one) is type(two)
        jax.tree.map(np.testing.assert_array_equal, vars(one), vars(two))
    assert actual[4] == expected[4]


def test_an_equinox_module_is_integer_throughout():
    network = jaxqat.calibrate(Equinox(), batches=[ROWS])
    graph = jaxqat.convert(network, ROWS[:1], strict=True)
    check = jaxqat.verify(network, graph=graph, batches=[ROWS])
    assert (check.differing, check.failures) == (0, ())


@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_the_quantized_nnx_module_holds_the_ranges_of_calibration(recipe):
    module = NNX()
    network = jaxqat.calibrate(module, batches=[ROWS], recipe=recipe)
    model = network.model
    assert isinstance(model, QuantizedNNX)
    held = {"quant": model.quant.get_value(), "quant_params": model.quant_params.get_value()}
    for name in ("quant", "quant_params"):
        expected = network.variables.get(name, {})
        jax.tree.map(np.testing.assert_array_equal, held[name], expected)
    assert int(held["quant"]["first"]["input"]["count"]) == 1
    model.eval()
    np.testing.assert_array_equal(model(ROWS), network(ROWS))


@pytest.mark.parametrize(
    "recipe", [8, object(), None, jaxqat.Recipe], ids=lambda x: type(x).__name__
)
def test_what_is_no_recipe_is_refused_with_what_would_be_right(recipe):
    with pytest.raises(
        jaxqat.RecipeError,
        match=r"must be a jaxqat\.Recipe, the name of a preset such as 'int8' or an AQT "
        r"configuration, got "
        r".*pass Recipe\(weight_bits=4",
    ):
        jaxqat.quantize(Linen(), recipe)


@pytest.mark.parametrize("model", [Linen, NNX, Equinox])
def test_a_class_in_the_place_of_a_model_is_refused(model):
    match = rf"got the class {model.__name__} \(pass an instance of it\)"
    with pytest.raises(jaxqat.QuantizationError, match=match):
        jaxqat.quantize(model)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_not_quantized_twice(name):
    kind = KINDS[name]
    network = jaxqat.calibrate(kind.make(), *kind.state, batches=[ROWS])
    for model in (jaxqat.quantize(kind.make()), network):
        with pytest.raises(jaxqat.QuantizationError, match="is quantized already"):
            jaxqat.quantize(model)
    with pytest.raises(jaxqat.QuantizationError, match="is quantized already"):
        jaxqat.calibrate(network, batches=[ROWS], recipe="int8")


@pytest.mark.parametrize("name", ["linen", "function", "equinox"])
def test_variables_without_one_of_the_two_collections_are_refused(name):
    kind = KINDS[name]
    model: Any = jaxqat.quantize(kind.make(), "w4a4_lsq")
    network = jaxqat.calibrate(model, *kind.state, batches=[ROWS])
    variables = dict(network.variables)
    assert set(variables) == {"params", "quant", "quant_params"}
    np.testing.assert_array_equal(model.apply(variables, ROWS), network(ROWS))
    learned = variables.pop("quant_params")
    frozen = lambda variables: model.apply(variables, ROWS)  # noqa: E731
    moving = lambda variables: model.apply(variables, ROWS, mutable=["quant"])  # noqa: E731
    for call in (frozen, moving):
        with pytest.raises(jaxqat.QuantizationError, match=r"'quant_params' lacks .*4 learned"):
            call(variables)
        with pytest.raises(jaxqat.QuantizationError, match=r"No activation ranges\. Call"):
            call({"params": variables["params"]})
        with pytest.raises(
            jaxqat.QuantizationError, match=r"'quant_params' without 'quant'\. Pass"
        ):
            call({"params": variables["params"], "quant_params": learned})


def test_an_nnx_module_without_one_of_the_two_collections_is_refused():
    model = jaxqat.quantize(NNX(), "w4a4_lsq")
    with pytest.raises(jaxqat.QuantizationError, match=r"No activation ranges\. Call"):
        model(ROWS)
    model.calibrate(ROWS)
    model.quant_params.set_value({})
    with pytest.raises(jaxqat.QuantizationError, match=r"'quant_params' lacks .*4 learned"):
        model(ROWS)
