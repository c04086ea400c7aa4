"""Strict conversion raises `ConversionError`, naming each place and reason."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer import models
from integer.models import MODELS, WEIGHTS, conv, inputs, trained

import jaxqat
from jaxqat import ConversionError

relu = jax.nn.relu


def features(p, x):
    return relu(conv(x, p["a"]))


def head(p, x):
    return x.mean((1, 2)) @ p["head"]


def leaky(x):
    """With slopes by row."""
    return jnp.where(x > 0, x, x * jnp.linspace(0.1, 0.3, x.shape[1])[:, None, None])


REFUSED = {
    "softmax": (
        lambda p, x: jax.nn.softmax(head(p, features(p, x))),
        r"the model's output: \(1, 5\) comes from a softmax\. .* such as softmax, outside",
    ),
    "relu behind the head": (
        lambda p, x: relu(head(p, features(p, x))),
        "the model's output: .*a clipping.* of the last product",
    ),
    "the second of two results": (
        lambda p, x: {"logits": head(p, features(p, x)), "mean": relu(head(p, features(p, x)))},
        "the model's output/mean: .*a clipping.* of the last product",
    ),
    "its own input": (lambda p, x: x, "the model's output: .* comes from the input"),
    "slopes by row": (
        lambda p, x: head(p, leaky(conv(x, p["a"]))),
        "head/pool: 'gt' before it has no integer form",
    ),
    "a cumulative sum": (
        lambda p, x: head(p, jnp.cumsum(conv(x, p["a"]), 1)),
        "head/pool: 'cumsum' before it has no integer form",
    ),
    "attention": (
        lambda p, x: jnp.einsum("nhwc,nhwd->ncd", features(p, x), features(p, x))[:, 0] @ p["head"],
        r"dot_general.* \(dense\): both operands depend on the data",
    ),
    "a difference": (
        lambda p, x: head(p, relu(conv(x, p["a"]) - features(p, x))),
        "head/pool: 'sub' before it has no integer form",
    ),
    "a function of the input": (
        lambda p, x: head(p, relu(conv(jnp.sin(x), p["a"]))),
        "a/input: 'sin' before it has no integer form",
    ),
    "a loop": (
        lambda p, x: head(
            p, jax.lax.fori_loop(0, 129, lambda _, c: relu(conv(c, p["b"])), features(p, x))
        ),
        r"scan1 \(any\): 1 product\(s\) inside a 'scan', which stays whole",
    ),
    "a choice of rows by the data": (
        lambda p, x: features(p, x)[:, jnp.argmax(x.sum((0, 2, 3)))].mean(1) @ p["head"],
        r"head/(pool|input): '\w+' before it has no integer form",
    ),
    "a mean over channels": (
        lambda p, x: features(p, x).mean((1, 3)) @ p["head"],
        r"head/input: the average .* sums over the axes \(1, 3\), not the spatial ones",
    ),
    "a concatenation of batches": (
        lambda p, x: conv(jnp.concatenate([features(p, x), features(p, x)]), p["b"]),
        "b/input: a concatenation of batches",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integer_form_is_named_with_the_reason(name):
    function, match = REFUSED[name]
    model = jaxqat.quantize(function)
    variables = model.init_quant({"params": WEIGHTS}, inputs(1))
    with pytest.raises(ConversionError, match=match):
        jaxqat.convert(model, variables, inputs(1), strict=True)


def test_everything_that_stands_in_the_way_is_told_at_once():
    def function(p, x):
        return jax.nn.softmax(jnp.cumsum(features(p, jnp.sin(x)), 1).mean((1, 2)) @ p["head"])

    model = jaxqat.quantize(function)
    with pytest.raises(ConversionError) as error:
        variables = model.init_quant({"params": WEIGHTS}, inputs(1))
        jaxqat.convert(model, variables, inputs(1), strict=True)
    for place in ("a/input: 'sin'", "head/pool: 'cumsum'", "the model's output: "):
        assert place in str(error.value)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x)).reshape(x.shape[0], -1, 8)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
        return nn.Dense(5, name="head")(x[:, 0])


def uncalibrated(module, recipe: jaxqat.Recipe | str = "int8"):
    """A quantized module and variables whose ranges have seen nothing."""
    images = inputs(1)
    init = functools.partial(module.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    variables = dict(models.randomized(shapes))
    model = jaxqat.quantize(module, recipe)
    return model, model.init_quant(variables, images, train=False)


def test_attention_in_a_module_is_named_by_its_path():
    model, variables = uncalibrated(Attention())
    with pytest.raises(ConversionError, match="both operands depend on the data") as error:
        jaxqat.convert(model, variables, inputs(1), strict=True, train=False)
    assert "attention" in str(error.value)


def test_a_layer_that_the_recipe_leaves_in_float_is_named():
    rule = jaxqat.Rule(path="conv1", weight_bits=None, act_bits=None)
    model, variables = uncalibrated(MODELS["residual"], jaxqat.Recipe(rules=(rule,)))
    with pytest.raises(ConversionError, match=r"conv1 \(conv\): the recipe leaves it in float"):
        jaxqat.convert(model, variables, inputs(1), strict=True, train=False)


@pytest.mark.parametrize("model", [MODELS["mlp"], lambda p, x: x, {"params": {}}])
def test_what_was_never_quantized_is_refused(model):
    with pytest.raises(ConversionError, match=r"what `jaxqat.quantize` returned.* got \w+\."):
        jaxqat.convert(model, {}, inputs(1), train=False)


def test_ranges_that_have_seen_no_data_are_named():
    model, variables = uncalibrated(MODELS["mlp"])
    with pytest.raises(ConversionError) as error:
        jaxqat.convert(model, variables, inputs(1), train=False)
    for name in ("dense1/input", "dense2/input", "head/input"):
        assert f"{name}: its range has seen no data; `calibrate` the ranges first" in str(
            error.value
        )


def test_variables_without_ranges_are_refused():
    model, variables = uncalibrated(MODELS["mlp"])
    with pytest.raises(jaxqat.QuantizationError, match=r"No activation ranges\. Call `calibrate`"):
        jaxqat.convert(model, {"params": variables["params"]}, inputs(1), train=False)
    del variables["quant"]["dense1"]
    with pytest.raises(jaxqat.QuantizationError, match=r"No range for 'dense1/input'"):
        jaxqat.convert(model, variables, inputs(1), train=False)


def test_a_network_that_diverged_is_refused_by_name():
    model = trained(MODELS["mlp"])
    for path, match in (
        (("quant", "head", "input", "max"), "head/input: its range is not finite"),
        (("params", "dense2", "kernel"), "node 'dense2': .* is not positive and finite"),
    ):
        variables = jax.tree_util.tree_map_with_path(
            lambda where, x, path=path: x * np.nan if tuple(k.key for k in where) == path else x,
            model.variables,
        )
        broken = dataclasses.replace(model, variables=variables)
        with pytest.raises(ConversionError, match=match):
            broken.convert()


def test_an_accumulator_that_could_overflow_is_refused_with_the_layer_s_name():
    """Code 127 for each weight, times 255 steps of an input that is never negative."""

    def function(p, x):
        return x @ p["wide"]["w"]

    size = 70_000
    for inputs_count, refused in ((size, True), (2**31 // (255 * 127), False)):
        weights = {"wide": {"w": np.ones((inputs_count, 1), np.float32)}}
        x = np.linspace(0, 2, inputs_count, dtype=np.float32)[None]
        model = jaxqat.quantize(function)
        variables = model.calibrate({"params": weights}, x)
        if not refused:
            jaxqat.convert(model, variables, x)
            continue
        with pytest.raises(ConversionError) as error:
            jaxqat.convert(model, variables, x)
        found = re.search(
            r"node 'wide': its accumulator, bias included, can reach (\d+)", str(error.value)
        )
        assert found and 2**31 <= int(found[1]) <= size * 127 * 255
