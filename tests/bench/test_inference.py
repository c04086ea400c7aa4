"""The inference benchmark: comparisons, errors, engines that are not measured, notes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from integer import graphs

from jaxqat.bench import inference
from jaxqat.bench.checks import BenchmarkError
from jaxqat.bench.engines import Engine, Kind, Setup, engines_of
from jaxqat.bench.floats import JaxNetwork
from jaxqat.bench.inference import benchmark_inference, notes
from jaxqat.bench.networks import make_images
from jaxqat.integer._execute.executor import make_executor

GRAPH = graphs.build("residual")


def engine(key, function, *, kind: Kind = "exact", precision="integer", packages=("jax",)):
    """An engine that computes `function(graph, images)`."""

    def make(setup):
        return lambda images: lambda: function(setup.graph, images)

    return Engine(key, f"the engine {key}", packages, precision, kind, make)


@functools.cache
def compiled(graph):
    network = JaxNetwork(graph, "fp32")
    apply, arrays = jax.jit(network.apply), network.arrays()
    return make_executor(graph), lambda images: apply(arrays, images)


def integers(graph, images):
    return np.asarray(compiled(graph)[0](images))


def floats(graph, images):
    return np.asarray(compiled(graph)[1](images))


JAX = [
    engine("jax_fp32", floats, kind="float", precision="fp32"),
    engine("jax_integer", integers),
]


def measure(monkeypatch, *engines, graph=GRAPH, **options):
    """Run a benchmark of these engines with made-up times."""
    monkeypatch.setattr(inference, "engines_of", lambda device: list(engines))
    monkeypatch.setattr(inference, "alternate", made_up_times)
    return benchmark_inference(graph, threads=1, batch_sizes=[2], rounds=1, **options)


def made_up_times(calls, *, rounds):
    """The first engine takes one second per call, each other one a second longer."""
    return {name: [float(i + 1)] * rounds for i, name in enumerate(calls)}


def rows_of(result):
    return {row["key"]: row for row in result["batches"][0]["engines"]}


@pytest.mark.parametrize(
    ("kind", "precision", "wrong", "against"),
    [
        ("exact", "integer", lambda g, x: integers(g, x) * np.float32(1.0001), "jax_integer"),
        ("exact", "integer", lambda g, x: integers(g, x[::-1]), "jax_integer"),
        ("near", "integer", lambda g, x: -integers(g, x), "jax_integer"),
        ("other", "integer", lambda g, x: 0 * floats(g, x), "jax_fp32"),
        ("float", "fp32", lambda g, x: floats(g, x) * np.float32(1.001), "jax_fp32"),
        ("float", "fp32", lambda g, x: floats(g, x)[None], "jax_fp32"),
        ("float", "bf16", lambda g, x: floats(g, x) * np.nan, "jax_fp32"),
    ],
    ids=["scaled", "shuffled", "near", "zeros", "float", "shape", "nan"],
)
def test_wrong_results_raise_an_error_with_the_names_of_both_engines(
    monkeypatch, kind, precision, wrong, against
):
    bad = engine("bad", wrong, kind=kind, precision=precision)
    with pytest.raises(BenchmarkError, match=f"batch 2: bad and {against} disagree"):
        measure(monkeypatch, *JAX, bad)


def test_jax_integer_is_compared_with_jax_fp32(monkeypatch):
    bad = engine("jax_integer", lambda g, x: -integers(g, x))
    with pytest.raises(BenchmarkError, match="jax_integer and jax_fp32 disagree"):
        measure(monkeypatch, JAX[0], bad)


def test_correct_results_are_accepted_and_their_errors_reported(monkeypatch):
    half = engine("near", lambda g, x: integers(g, x) / np.float32(2), kind="near")
    rows = rows_of(measure(monkeypatch, *JAX, engine("equal", integers), half))
    assert rows["equal"]["agreement"]["error"] == 0
    assert rows["equal"]["agreement"]["top1"] == 1
    assert rows["equal"]["agreement"]["against"] == "jax_integer"
    assert rows["near"]["agreement"]["error"] == 0.5  # Powers of two are exact.
    assert "agreement" not in rows["jax_fp32"]


def test_a_network_of_two_bits_may_differ_from_the_float_network(monkeypatch):
    graph = graphs.build("concat", bits=2)
    rows = rows_of(measure(monkeypatch, *JAX, graph=graph))
    assert rows["jax_integer"]["agreement"]["error"] > 0.7
    assert rows["jax_integer"]["agreement"]["limit"] is None
    bad = engine("jax_integer", lambda g, x: integers(g, x) * np.nan)
    with pytest.raises(BenchmarkError, match="expected a finite number"):
        measure(monkeypatch, JAX[0], bad, graph=graph)


def test_an_engine_that_is_not_installed_is_listed_and_not_measured(monkeypatch):
    absent = engine("absent", integers, packages=("no_such_package", "jax"))
    row = rows_of(measure(monkeypatch, *JAX, absent))["absent"]
    assert row["not_measured"] == "no_such_package is not installed"
    assert "median_s" not in row
    assert row["ratio_to_jax_fp32"] is None


class OwnError(Exception):
    """Derived from Exception only, as ONNX Runtime's exceptions."""


@pytest.mark.parametrize("when", ["built", "bound", "called"])
def test_an_engine_that_fails_is_listed_with_the_reason(monkeypatch, when):
    def fail(*arguments):
        raise OwnError("\n  no kernel for Conv\nstack of a compiler")

    makes = {
        "built": fail,
        "bound": lambda setup: fail,
        "called": lambda setup: lambda images: fail,
    }
    failing = dataclasses.replace(engine("failing", integers), make=makes[when])
    rows = rows_of(measure(monkeypatch, *JAX, failing))
    assert rows["failing"]["not_measured"] == "no kernel for Conv"
    assert "median_s" not in rows["failing"]
    assert rows["jax_integer"]["median_s"] == 2.0


@pytest.mark.parametrize("key", ["jax_fp32", "jax_integer"])
def test_a_failing_reference_engine_is_an_error(monkeypatch, key):
    def fail(graph, images):
        raise OwnError("out of memory")

    engines = [engine(key, fail) if e.key == key else e for e in JAX]
    with pytest.raises(BenchmarkError, match=f"the engine {key} cannot run .*: out of memory"):
        measure(monkeypatch, *engines)


def test_medians_rates_and_ratios_follow_from_the_times(monkeypatch):
    ort = engine("ort_fp32", floats, kind="float", precision="fp32")
    rows = rows_of(measure(monkeypatch, *JAX, ort))
    assert [rows[k]["median_s"] for k in ("jax_fp32", "jax_integer", "ort_fp32")] == [1.0, 2.0, 3.0]
    assert rows["jax_integer"]["images_per_s"] == 1.0  # A batch of two.
    assert rows["jax_integer"]["ratio_to_jax_fp32"] == 0.5
    assert rows["jax_integer"]["ratio_to_ort_fp32"] == 1.5


def test_notes_name_integer_engines_slower_than_float_ones_of_their_family():
    def row(key, precision, seconds):
        return {"key": key, "label": key.upper(), "precision": precision, "median_s": seconds}

    rows = [
        row("jax_fp32", "fp32", 1.0),
        row("jax_bf16", "bf16", 4.0),
        row("jax_integer", "integer", 2.0),
        row("ort_fp32", "fp32", 1.0),
        row("ort_integer", "integer", 0.5),
        row("ort_static", "integer", 0.25),
        {"key": "torch_fp32", "label": "", "precision": "fp32", "not_measured": "absent"},
    ]
    families = {r["key"]: r["key"].partition("_")[0] for r in rows}
    assert notes(rows, families) == [
        "JAX_INTEGER is slower than JAX_FP32 here: 0.50 times its speed.",
        "ORT_INTEGER is slower than ORT_STATIC here: 0.50 times its speed.",
    ]
    assert notes([r | {"median_s": 1.0} for r in rows[:-1]], families) == []


def test_a_runs_images_are_used_if_they_fit_and_noise_otherwise(monkeypatch):
    pixels = graphs.pixels(GRAPH, 3)
    assert measure(monkeypatch, *JAX, pixels=pixels)["images"] == "test images of the run"
    assert measure(monkeypatch, *JAX, pixels=pixels[:, 1:])["images"] == "noise"
    assert measure(monkeypatch, *JAX)["images"] == "noise"
    tensor = GRAPH.tensors[GRAPH.quantize.output]
    images = make_images(GRAPH, 4, pixels)
    assert images.dtype == np.float32 and images.flags.c_contiguous
    # Within half a code of the images that training normalizes; the fourth repeats the first.
    exact = graphs.normalized(pixels)
    assert np.abs(images[:3] - exact).max() <= tensor.scale * (0.5 + 2**-12)
    np.testing.assert_array_equal(images[3], images[0])


@pytest.mark.slow
def test_all_engines_of_this_machine_agree_on_a_network():
    result = benchmark_inference(graphs.build("depthwise"), threads=1, batch_sizes=[3], rounds=1)
    rows = rows_of(result)
    for key in ("jax_fp32", "jax_bf16", "jax_integer"):
        assert rows[key]["median_s"] > 0
    for key, row in rows.items():
        assert ("median_s" in row) != ("not_measured" in row), key
        assert "not_measured" not in row or "is not installed" in row["not_measured"], row
    if "agreement" in rows["ort_integer"]:
        assert rows["ort_integer"]["agreement"]["limit"] < 1e-6


@pytest.mark.parametrize(
    ("device", "keys"),
    [
        ("cuda", "jax_fp32 jax_tf32 jax_bf16 jax_integer jax_integer_pallas"),
        ("tpu", "jax_fp32 jax_bf16 jax_integer"),
    ],
)
def test_accelerators_run_jax_in_every_precision_and_nothing_on_the_host(device, keys):
    engines = engines_of(device)
    assert [engine.key for engine in engines] == keys.split()
    assert {engine.family for engine in engines} == {"jax"}
    assert len({engine.label for engine in engines}) == len(engines)


def test_quantize_static_gets_its_best_options_and_calibration_images(monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from jaxqat.bench import engines as module

    models = []
    monkeypatch.setattr(module, "_bind_onnx", lambda model, setup, exact: models.append(model))
    images = make_images(GRAPH, 8)
    (static,) = [e for e in module.CPU_ENGINES if e.key == "ort_static"]
    static.make(Setup(GRAPH, 1, np.split(images, 2)))
    (model,) = models
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    assert len(convolutions) == sum(p.kind == "conv" for p in GRAPH.products())
    for node in convolutions:
        data, weights = (makers[name] for name in node.input[:2])
        assert data.op_type == weights.op_type == "DequantizeLinear"
        assert arrays[data.input[2]].dtype == np.uint8
        assert arrays[weights.input[0]].dtype == np.int8
        assert arrays[weights.input[1]].shape == (arrays[weights.input[0]].shape[0],)
    first = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    # The range of the images divided by 255, in float32.
    spread = (images.max() - images.min()) / 255
    np.testing.assert_allclose(arrays[first.input[1]], spread, rtol=1e-6)
