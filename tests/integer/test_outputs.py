"""Networks with several results: heads, features, and results of every shape."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer.test_islands import PARAMS, X, calibrated, conv, head
from references import integer_graph, sqnr

import jaxqat
from jaxqat.errors import GraphError
from jaxqat.integer._results import check_places, flat

pytestmark = pytest.mark.slow


class Heads(NamedTuple):
    policy: Any
    value: Any


def features(p, x):
    return jax.nn.relu(conv(x / 255, p["first"]) + p["first"]["bias"])


def two_heads(p, x):
    x = jax.nn.relu(conv(features(p, x), p["second"], (2, 2)))
    return {"value": x.mean((1, 2)) @ p["head"]["kernel"][:, :1], "policy": head(p, x)}


def backbone(p, x):
    first = features(p, x)
    second = jax.nn.relu(conv(first, p["second"], (2, 2)) + conv(first, p["second"], (2, 2)))
    return [first, (second, second.mean((1, 2)))]


def named(p, x):
    logits = head(p, features(p, x))
    return Heads(jax.nn.softmax(logits), logits.max(-1))


def same_twice(p, x):
    logits = head(p, features(p, x))
    return logits, logits, {"as it is": x, "none": None}


def other_shapes(p, x):
    x = features(p, x)
    dense = x @ p["head"]["kernel"]
    return (
        dense.transpose(0, 3, 1, 2),
        jax.nn.relu(dense),
        dense.reshape(-1, 320),
        x[:, 0].argmax(-1),
    )


# The model, and the places of its results.
MODELS = {
    "an actor with a critic": (two_heads, [("policy",), ("value",)]),
    "a backbone": (backbone, [(0,), (1, 0), (1, 1)]),
    "a named tuple": (named, [("policy",), ("value",)]),
    "one result twice": (same_twice, [(0,), (1,), (2, "as it is")]),
    "other shapes": (other_shapes, [(0,), (1,), (2,), (3,)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_result_is_the_model_s_in_its_place(name, tmp_path):
    function, places = MODELS[name]
    x = np.round(X * 50 + 100)
    bound = jaxqat.calibrate(jaxqat.quantize(function), {"params": PARAMS}, batches=[x])
    graph = jaxqat.convert(bound, x[:2])
    assert [output.path for output in graph.outputs] == places
    found = jaxqat.verify(bound, graph=graph, batches=[x])
    assert found.failures == () and found.codes

    expected = jax.tree.leaves(bound(x))
    own = jaxqat.make_executor(graph)(x)
    reference = integer_graph.run(graph, x)[1]
    path = jaxqat.save(graph, tmp_path / "network")
    stored = jaxqat.make_executor(jaxqat.load(path))(x)
    program = jaxqat.load_stablehlo(
        jaxqat.export_stablehlo(graph, tmp_path / "n.shlo", platforms=["cpu"])
    )(x)
    from jaxqat.export import run_onnx

    file, _ = run_onnx(jaxqat.export_onnx(graph, tmp_path / "n.onnx"), x)
    for result in (own, reference, stored, program, file):
        for one, other in zip(flat(graph.outputs, result), expected, strict=True):
            assert one.shape == other.shape and np.asarray(one).dtype == np.asarray(other).dtype
            # Behind islands float32 programs round differently: sums of at most 8 numbers here.
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6 * np.abs(other).max())
    real = jax.tree.leaves(function(PARAMS, x))
    for one, other in zip(flat(graph.outputs, own), real, strict=True):
        if jnp.issubdtype(other.dtype, jnp.floating):
            assert sqnr.decibels(other, one) > 20


@pytest.mark.parametrize(
    "paths",
    [
        [],
        [("a",), ("a",)],
        [("a",), ("a", 0)],
        [("a",), (0,)],
        [("a", 0), ("a", "b")],
        [(-1,)],
        [(10**9,)],
        [(True,)],
        [(), ("a",)],
    ],
)
def test_places_that_no_result_can_have_are_refused(paths):
    with pytest.raises(ValueError, match="place"):
        check_places(paths)


def test_labels_are_those_of_one_of_the_results():
    graph = jaxqat.convert(calibrated(two_heads), X[:2])
    names = [f"action {n}" for n in range(5)]
    assert dataclasses.replace(graph, metadata={"labels": names}).metadata["labels"] == names
    with pytest.raises(GraphError, match=r"labels names 4 classes, .* have the shapes"):
        dataclasses.replace(graph, metadata={"labels": names[:4]})
