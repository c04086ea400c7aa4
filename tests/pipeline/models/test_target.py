"""`model.target`: a network of the user's own behind the interface of the ResNet."""

import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import own_models
import pytest
from flax import nnx
from tiny_run import tiny

from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import ConfigError, config_hash
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.models import ModelConfig, TargetError, build_model, check_target
from jaxqat.pipeline.networks import Networks

IMAGES = jax.random.normal(jax.random.key(3), (4, 8, 8, 1))


def build(name: str, **arguments):
    config = ModelConfig(target=f"own_models:{name}", arguments=arguments)
    module = build_model(config, 10)
    check_target(config, module, IMAGES, 10)
    return module


@pytest.mark.slow
def test_a_linen_module_keeps_its_variables_and_gets_its_own_mode_argument():
    module, own = build("LinenDropout", features=[4, 6]), own_models.LinenDropout(10, (4, 6))
    key = jax.random.key(0)
    variables = module.init(key, IMAGES, train=False)
    jax.tree.map(
        np.testing.assert_array_equal, variables, own.init(key, IMAGES, deterministic=True)
    )
    for train in (False, True):
        np.testing.assert_array_equal(
            module.apply(variables, IMAGES, train=train, rngs={"dropout": key}),
            own.apply(variables, IMAGES, deterministic=not train, rngs={"dropout": key}),
        )
    dropped = module.apply(variables, IMAGES, train=True, rngs={"params": key})
    assert jnp.any(dropped != module.apply(variables, IMAGES, train=False))


def test_an_nnx_module_computes_the_same_and_its_statistics_move_in_training():
    module = build("NNXBatchNorm", features=4)
    variables = module.init(jax.random.key(0), IMAGES, train=False)
    own = own_models.NNXBatchNorm(4, num_classes=10, rngs=nnx.Rngs(7))
    conv, norm = cast(Any, own.layers)
    head = cast(Any, own.head)
    params = variables["params"]
    conv.kernel[...] = params["layers"]["0"]["kernel"]
    norm.scale[...], norm.bias[...] = (params["layers"]["1"][name] for name in ("scale", "bias"))
    head.kernel[...], head.bias[...] = (params["head"][name] for name in ("kernel", "bias"))
    own.eval()
    np.testing.assert_array_equal(module.apply(variables, IMAGES, train=False), own(IMAGES))

    own.train()
    own(IMAGES)
    key = jax.random.key(1)
    calls = [
        module.apply(variables, IMAGES, train=True, mutable=["batch_stats"], rngs={"params": k})
        for k in (key, key, jax.random.key(2))
    ]
    statistics = calls[0][1]["batch_stats"]["layers"]["1"]
    np.testing.assert_array_equal(statistics["mean"], norm.mean[...])
    np.testing.assert_array_equal(statistics["var"], norm.var[...])
    assert jnp.any(statistics["mean"] != variables["batch_stats"]["layers"]["1"]["mean"])
    assert jnp.all(calls[0][0] == calls[1][0]) and jnp.any(calls[0][0] != calls[2][0])


@pytest.mark.parametrize(("name", "arguments"), [("Stateless", {"classes": 10}), ("stateless", {})])
def test_a_network_without_mode_and_state_is_taken_as_a_class_and_from_a_function(name, arguments):
    module = build(name, **arguments)
    variables = module.init(jax.random.key(0), IMAGES, train=False)
    assert set(variables) == {"params"} and set(variables["params"]) == {"conv", "norm", "head"}
    logits, updates = module.apply(variables, IMAGES, train=True, mutable=[])
    assert logits.shape == (4, 10) and not updates


def test_the_current_directory_is_searched_first(tmp_path, monkeypatch):
    (tmp_path / "net_here.py").write_text("from own_models import Stateless as Net\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    module = build_model(ModelConfig(target="net_here:Net", arguments={"classes": 10}), 10)
    assert sys.modules["net_here"].__file__ == str(tmp_path / "net_here.py")
    assert module.init(jax.random.key(0), IMAGES, train=False)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("no_such_module:Net", {}, "there is no module 'no_such_module'"),
        (
            "own_models:Stateles",
            {},
            "own_models has no 'Stateles'; the nearest name is 'Stateless'",
        ),
        ("own_models:READY", {}, "is a module that was already made; name its class"),
        ("own_models:jnp", {}, "must be the class of a Linen module"),
        ("builtins:dict", {}, "or a function that returns one, got the class builtins.dict"),
        ("own_models:number", {}, "must make a Linen module .* got a int"),
        ("own_models:fails", {}, r"own_models.py, line \d+\): RuntimeError: no weights here"),
        ("own_models:Stateless", {}, "needs model.arguments.classes"),
        (
            "own_models:Stateless",
            {"clases": 10},
            "model.arguments.clases: .* it takes classes. The nearest right one is "
            "model.arguments.classes",
        ),
        ("own_models:NNXBatchNorm", {"rngs": 0}, "model.arguments.rngs: .* no such argument"),
        (
            "own_models:Stateless",
            {"classes": 7},
            r"must return float logits of shape .* \[4, 10\], got float32\[4, 7\]. The data has 10",
        ),
        ("own_models:LinenDropout", {"features": "x"}, r"with images of 8x8x1 failed \(.*Error: "),
    ],
)
def test_a_target_that_cannot_be_used_is_an_error_that_names_it(target, arguments, message):
    config = ModelConfig(target=target, arguments=arguments)
    with pytest.raises(TargetError, match=message) as error:
        check_target(config, build_model(config, 10), IMAGES, 10)
    assert "model.target" in str(error.value) or "model.arguments" in str(error.value)


def test_bfloat16_needs_a_target_that_takes_dtype():
    with pytest.raises(TargetError, match=r"precision bfloat16 needs .* an argument `dtype`"):
        build_model(ModelConfig(target="own_models:stateless"), 10, jnp.bfloat16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "own_models.Net"}, "model.target must be 'package.module:Name'"),
        ({"target": "own_models:a b"}, "model.target must be 'package.module:Name'"),
        ({"target": "m:Net", "width": 8}, "pass model.arguments.width"),
        ({"arguments": {"width": 8}}, "model.arguments are those of model.target"),
        ({"target": "m:Net", "arguments": {"a": [float("inf")]}}, r"model.arguments.a\[0\] must"),
    ],
)
def test_wrong_settings_of_a_target_name_the_key(values, message):
    with pytest.raises(ConfigError, match=message):
        configs.from_dict({"model": values})


def test_target_and_arguments_are_in_the_config_and_its_hash():
    one = tiny(model__target="own_models:NNXBatchNorm", model__arguments={"features": 4})
    other = tiny(model__target="own_models:NNXBatchNorm", model__arguments={"features": 5})
    assert configs.to_dict(one)["model"]["arguments"] == {"features": 4}
    assert config_hash(one) != config_hash(other)
    assert configs.differences(one, other) == ["model.arguments.features: 4 -> 5"]


def test_quantized_layers_have_the_names_of_the_users_module():
    experiment = tiny(
        model__target="own_models:NNXBatchNorm",
        model__arguments={"features": 4},
        quant__rules=[{"path": "layers/0", "weight_bits": 4}],
    )
    layers = Networks.build(experiment, load_dataset(experiment.data)).describe()
    assert [(layer.path, layer.weight_bits) for layer in layers] == [("layers/0", 4), ("head", 8)]
