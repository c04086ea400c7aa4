"""`analyze` against NumPy in float64 and against the model itself."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from integer.models import MODELS, inputs, trained
from references.sqnr import decibels

import jaxqat
from jaxqat import QuantizationError, Recipe, Rule

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PARAMS = {
    name: RNG.normal(0, 0.4, shape).astype(np.float32)
    for name, shape in {"first": (6, 16), "second": (16, 8), "third": (8, 5)}.items()
}
ROWS = RNG.normal(size=(64, 6)).astype(np.float32)
SEEN = RNG.normal(0, 0.5, size=(32, 6)).astype(np.float32)  # Narrower: the rest is clipped.
CLASSES = RNG.integers(0, 5, 64)
BATCHES, LABELS = [ROWS[:32], ROWS[32:]], [CLASSES[:32], CLASSES[32:]]


def mlp(params, x):
    x = jax.nn.relu(x @ params["first"])
    x = jax.nn.relu(x @ params["second"])
    return x @ params["third"]


def calibrated(recipe: Recipe | str = "int8"):
    return jaxqat.quantize(mlp, recipe).bind({"params": PARAMS}).calibrate(SEEN)


@functools.cache
def found():
    return jaxqat.analyze(calibrated(), batches=iter(BATCHES), labels=LABELS)


class Reference:
    """Compute the same network in float64 NumPy, with chosen layers quantized."""

    def __init__(self):
        self.ranges = calibrated().variables["quant"]
        self.inputs, self.outputs, self.codes, self.grids = {}, {}, {}, {}

    def run(self, on):
        x = ROWS.astype(np.float64)
        for name, weights in PARAMS.items():
            self.inputs[name] = x
            if name in on:
                x, weights = self.quantized(name, x), self.weights(name)
            x = self.outputs[name] = x @ weights
            x = np.maximum(x, 0) if name != "third" else x
        return x

    def quantized(self, name, x):
        low, high = (float(self.ranges[name]["input"][end]) for end in ("min", "max"))
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        zero = np.clip(-128 - np.round(low / scale), -128, 127)
        self.codes[name] = np.round(x / scale) + zero
        self.grids[name] = (scale * (-128 - zero), scale * (127 - zero))
        return scale * (np.clip(self.codes[name], -128, 127) - zero)

    @staticmethod
    def weights(name):
        scale = np.abs(PARAMS[name]).max(0, keepdims=True).astype(np.float64) / 127
        return scale * np.round(PARAMS[name] / scale)


# Float32 sums of a few hundred squares are off by at most 2**-15 of themselves, which is 10**-4 dB.
# A value at the border of two codes may fall to the other side in float64: one in some thousand
# values, of which the noise of its code is a like share, 4.3 dB / 1,000.
DECIBELS = 0.01


def test_sqnr_is_what_numpy_computes():
    reference, analysis = Reference(), found()
    reference.run(())
    real, outputs = dict(reference.inputs), dict(reference.outputs)
    reference.run(tuple(PARAMS))
    assert [layer.path for layer in analysis.layers] == list(PARAMS)
    tensors = {t.name: t for t in analysis.tensors}
    for layer in analysis.layers:
        name = layer.path
        weights = decibels(PARAMS[name].astype(np.float64), reference.weights(name))
        output = decibels(outputs[name], reference.outputs[name])
        read = decibels(real[name], reference.quantized(name, reference.inputs[name]))
        assert layer.weight_sqnr_db == pytest.approx(weights, abs=DECIBELS)
        assert layer.output_sqnr_db == pytest.approx(output, abs=DECIBELS)
        assert tensors[layer.input or ""].sqnr_db == pytest.approx(read, abs=DECIBELS)


def test_clipping_and_histograms_count_every_value():
    reference, analysis = Reference(), found()
    reference.run(())
    for tensor in analysis.tensors:
        name = tensor.name.removesuffix("/input")
        x = reference.inputs[name]
        reference.quantized(name, x)
        codes, (low, high) = reference.codes[name], reference.grids[name]
        clipped = int(((codes < -128) | (codes > 127)).sum())
        assert clipped > 0 and tensor.clipped * x.size == pytest.approx(clipped, abs=1e-6)
        assert tensor.values == x.size == sum(tensor.counts)
        # Two float32 roundings of each, and those of the activations.
        ends = (tensor.low, tensor.high, tensor.smallest, tensor.largest)
        np.testing.assert_allclose(ends, (low, high, x.min(), x.max()), rtol=1e-5, atol=1e-6)
        edges, step = np.asarray(tensor.edges), (high - low) / 255
        width = 256 * step / 64
        first = low - step / 2 - 16 * width
        np.testing.assert_allclose(edges, first + width * np.arange(97), rtol=1e-5, atol=1e-5)
        assert np.abs(x[..., None] - edges).min() > 1e-6  # Where roundings would decide.
        expected, _ = np.histogram(np.clip(x, edges[0], edges[-1]), edges)
        np.testing.assert_array_equal(tensor.counts, expected)
        assert sum(tensor.counts[:16]) + sum(tensor.counts[-16:]) == clipped


def test_sensitivity_is_what_numpy_computes_with_layers_on_and_off():
    reference, analysis = Reference(), found()
    real = reference.run(())
    paths = tuple(PARAMS)
    choices = {(s.path,): s.alone for s in analysis.sensitivity}
    choices |= {tuple(p for p in paths if p != s.path): s.without for s in analysis.sensitivity}
    choices |= {paths: analysis.quantized, (): analysis.real}
    assert len(choices) == 8
    for on, effect in choices.items():
        result = reference.run(on)
        assert effect.agreement == np.mean(result.argmax(-1) == real.argmax(-1))
        assert effect.accuracy == np.mean(result.argmax(-1) == CLASSES)
        if on:
            assert effect.sqnr_db == pytest.approx(decibels(real, result), abs=DECIBELS)
    assert analysis.real.sqnr_db is None and analysis.real.agreement == 1.0
    ratios = [s.alone.sqnr_db or 0 for s in analysis.sensitivity]
    assert 0 not in ratios and ratios == sorted(ratios) and analysis.examples == 64


@pytest.mark.parametrize("path", PARAMS)
def test_a_layer_of_two_bits_is_the_most_sensitive(path):
    recipe = Recipe(rules=(Rule(path=path, weight_bits=2, act_bits=8),))
    analysis = jaxqat.analyze(calibrated(recipe), batches=[SEEN])
    assert analysis.sensitivity[0].path == path
    worst, *others = (s.without.sqnr_db or 0 for s in analysis.sensitivity)
    assert worst > max(others)  # And it is worth most to leave it in float.
    assert all(s.alone.accuracy is None for s in analysis.sensitivity)
    assert str(analysis).splitlines()[1].startswith(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "mlp"])
def test_linen_modules_are_analyzed_with_normalization_as_a_part(name):
    model, images = trained(MODELS[name]), inputs(4, seed=1)
    analyze = functools.partial(
        jaxqat.analyze, model.model, model.variables, preprocess=lambda x: x / 255, train=False
    )
    analysis = analyze(batches=[np.round(255 * images)])
    logits = np.asarray(
        model.model.apply(model.variables, np.round(255 * images) / 255, train=False)
    )
    table = model.model.layers(model.variables, images, train=False)
    variables = {k: v for k, v in model.variables.items() if k != "quant"}
    real = MODELS[name].apply(variables, np.round(255 * images) / 255, train=False)
    # The logits to 2**-20 of themselves, and with them their difference.
    expected = decibels(np.asarray(real, np.float64), logits.astype(np.float64))
    assert analysis.quantized.sqnr_db == pytest.approx(expected, abs=0.05)
    assert [layer.path for layer in analysis.layers] == [row.path for row in table]
    data = json.loads(json.dumps(dataclasses.asdict(analysis), allow_nan=False))
    assert data["layers"][0]["path"] == table[0].path


def test_an_nnx_module_is_analyzed_as_the_function_is():
    class Module(nnx.Module):
        def __init__(self):
            for name, value in PARAMS.items():
                setattr(self, name, nnx.Param(jnp.asarray(value)))

        def __call__(self, x):
            return mlp({name: getattr(self, name)[...] for name in PARAMS}, x)

    model = jaxqat.quantize(Module())
    model.calibrate(SEEN)
    analysis = jaxqat.analyze(model, batches=BATCHES, labels=LABELS)
    actual, expected = (
        jax.tree.flatten(dataclasses.asdict(analysis)) for analysis in (analysis, found())
    )
    for left, right in zip(actual[0], expected[0], strict=True):
        # Float32 roundings of two programs: of sums a share of 2**-20, of decibels less.
        assert left == (right if isinstance(right, str) else pytest.approx(right, rel=1e-5))
    assert actual[1] == expected[1]


def test_a_layer_that_is_used_twice_has_two_rows_and_one_sensitivity():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(6, name="shared")
            return nn.Dense(3, name="head")(layer(nn.relu(layer(x))))

    variables = Twice().init(jax.random.key(0), ROWS)
    network = jaxqat.calibrate(Twice(), variables, batches=[SEEN])
    analysis = jaxqat.analyze(network, batches=[ROWS])
    assert [layer.path for layer in analysis.layers] == ["shared", "shared", "head"]
    assert {layer.input for layer in analysis.layers} == {t.name for t in analysis.tensors}
    assert sorted(s.path for s in analysis.sensitivity) == ["head", "shared"]
    assert len(str(analysis).splitlines()) == 5


def test_a_result_of_one_number_has_no_classes():
    model = jaxqat.quantize(lambda params, x: mlp(params, x)[:, :1])
    variables = model.calibrate({"params": PARAMS}, SEEN)
    analysis = jaxqat.analyze(model, variables, batches=[SEEN])
    assert analysis.quantized.agreement is None and analysis.quantized.sqnr_db is not None
    assert "agree" not in str(analysis)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": []}, "`batches` is empty"),
        ({"labels": LABELS[:1]}, "`labels` ends before `batches`"),
        ({"labels": [CLASSES, CLASSES]}, r"shape \(32,\), .* got \(64,\)"),
        ({"batches": [np.full_like(ROWS, np.nan)]}, "not finite"),
    ],
    ids=["no batch", "few labels", "other labels", "NaN"],
)
def test_what_cannot_be_analyzed_is_named(change, message):
    network = calibrated()
    with pytest.raises(QuantizationError, match=message):
        jaxqat.analyze(network, **{"batches": BATCHES, **change})


def test_a_model_without_quantized_layers_or_with_several_results_is_refused():
    with pytest.raises(QuantizationError, match="got function"):
        jaxqat.analyze(mlp, PARAMS, batches=BATCHES)  # pyright: ignore[reportArgumentType]
    rule = Rule(weight_bits=None, act_bits=None)
    with pytest.raises(QuantizationError, match="No layer of the model is quantized"):
        model = jaxqat.quantize(mlp, Recipe(rules=(rule,)))
        jaxqat.analyze(model, {"params": PARAMS}, batches=BATCHES)
    model = jaxqat.quantize(lambda params, x: (mlp(params, x), x))
    variables = model.calibrate({"params": PARAMS}, SEEN)
    with pytest.raises(QuantizationError, match=r"got 2 of the shapes \(32, 5\), \(32, 6\)"):
        jaxqat.analyze(model, variables, batches=BATCHES)


def attention(params, x):
    scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x @ params["query"], x @ params["key"]))
    return jnp.einsum("bqk,bkd->bqd", scores, x).mean(1) @ params["head"]


def test_products_of_two_activations_are_analyzed_like_layers():
    params = {n: RNG.normal(0, 0.4, (6, 6)).astype(np.float32) for n in ("query", "key", "head")}
    x = RNG.normal(size=(8, 5, 6)).astype(np.float32)
    rule = Rule(kind="attention", weight_bits=2, act_bits=2)
    network = jaxqat.calibrate(
        attention, {"params": params}, batches=[x], recipe=Recipe(rules=(rule,))
    )
    found = jaxqat.analyze(network, batches=[x])
    pairs = {row.path: row for row in found.sensitivity if "dot_general" in row.path}
    assert len(pairs) == 2
    # Two bits cost more than the eight of all other layers.
    assert {row.path for row in found.sensitivity[:2]} == set(pairs)
