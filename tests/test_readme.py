"""The README agrees with the results files and the configs, and its examples run."""

import json
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

import jaxqat

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ALL_RESULTS = {
    p: json.loads(p.read_text()) for p in (ROOT / "configs/results").glob("*/results.json")
}
# Runs that start from another run's FP32 network have a separate table.
RESULTS = sorted(p for p, results in ALL_RESULTS.items() if "from_run" not in results["fp32"])
LOW_BITS = sorted(p for p, results in ALL_RESULTS.items() if "from_run" in results["fp32"])


def label(path):
    """Return the README's name of a run's network."""
    model = yaml.safe_load((path.parent / "config.yaml").read_text())["model"]
    return f"ResNet-{model['depth']} of width {model['width']}"


def rows(path):
    """Yield the rows of the README's results table."""
    results = ALL_RESULTS[path]
    names = {"fp32": "FP32", "qat": "QAT, quantized", "integer": "QAT, integer"}
    sizes = {stage: f"{size:,}" for stage, size in results["size_bytes"].items()}
    for stage, name in names.items():
        test = results[stage]["test"]
        scores = (f"{100 * test[k]:.2f} %" for k in ("accuracy", "precision", "recall", "f1"))
        # The size is that of the integer network, not of the quantized one.
        yield f"| {label(path)} | {name} | {' | '.join(scores)} | {sizes.get(stage, '–')} |"


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.parent.name)
def test_the_results_of_every_file_are_in_the_results_table(path):
    results = ALL_RESULTS[path]
    for row in rows(path):
        assert row in README
    assert results["command"] in README
    assert f"seed {results['seed']}" in README
    assert f"`{path.relative_to(ROOT)}`" in README
    assert f"jax {results['environment']['jax']}" in README
    assert f"{results['fp32']['test']['n']:,} test images" in README


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.parent.name)
def test_the_counts_of_codes_and_classes_are_those_of_verify(path):
    check = ALL_RESULTS[path]["verify"]
    assert f"{check['differing']} of {check['codes']:,}" in README
    in_onnx, in_openvino = (
        json.loads((path.parent / f"evaluations/verify_{name}_test.json").read_text())
        for name in ("onnx", "openvino")
    )
    assert in_onnx["differing"] == 0
    assert f"{in_onnx['codes']:,}" in README  # With terms of sums, and what is only moved.
    assert f"{in_openvino['top1_flips']} of {in_openvino['images']:,}" in README


def test_every_row_of_the_results_table_has_a_results_file():
    expected = {row for path in RESULTS for row in rows(path)}
    found = re.findall(r"^\| ResNet-\d+ of width \d+ \| (?:FP32|QAT).*\|$", README, re.MULTILINE)
    assert set(found) == expected and len(found) == len(expected)
    assert expected


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.parent.name)
def test_the_report_beside_the_results_shows_their_scores(path):
    page, results = (path.parent / "report.html").read_text(), json.loads(path.read_text())
    assert f"]({path.relative_to(ROOT).parent}/report.html)" in README
    for stage in ("fp32", "qat", "integer"):
        scores = (results[stage]["test"][key] for key in ("accuracy", "precision", "recall", "f1"))
        row = "".join(rf"<td[^>]*>{100 * score:.2f}</td>\s*" for score in scores)
        assert re.search(row, page), stage
    assert len(page) < 1.2e6  # With the images; it is committed.


def row_of_bits(path):
    """Return the row of a network in the README's table of bits."""
    results = ALL_RESULTS[path]
    inner = [layer for layer in results["layers"] if "stage" in layer["path"]]
    ((weights, acts),) = {(layer["weight_bits"], layer["act_bits"]) for layer in inner}
    (ptq,) = results["ptq"].values()
    tests = (results["fp32"], ptq, results["integer"])
    scores = " | ".join(f"{100 * each['test']['accuracy']:.2f} %" for each in tests)
    return (
        f"| {label(path)} | W{weights}A{acts} | {scores} | {results['size_bytes']['integer']:,} |"
    )


def test_the_table_of_bits_has_exactly_one_row_for_each_results_file():
    expected = {row_of_bits(path) for path in ALL_RESULTS}
    assert set(re.findall(r"^\| ResNet.* \| W\dA\d .*\|$", README, re.MULTILINE)) == expected
    assert len(expected) == len(ALL_RESULTS)


@pytest.mark.parametrize("path", LOW_BITS, ids=lambda p: p.parent.name)
def test_a_network_of_fewer_bits_starts_from_the_same_float_network_and_is_exact(path):
    results = ALL_RESULTS[path]
    origin = ALL_RESULTS[path.parents[1] / results["fp32"]["from_run"]["name"] / path.name]
    assert results["fp32"]["from_run"]["config_hash"] == origin["config_hash"]
    for key in ("accuracy", "confusion_matrix"):
        assert results["fp32"]["test"][key] == origin["fp32"]["test"][key]
    assert results["verify"]["differing"] == 0
    assert f"0 of {results['verify']['codes']:,}" in README
    assert results["command"] in README
    assert f"`{path.relative_to(ROOT)}`" in README


def speed_rows(result):
    """Yield the rows of the README's table of speeds: images/s and the ratio to FP32."""
    sizes = [batch["batch_size"] for batch in result["batches"]]
    yield f"| engine | {' | '.join(f'batch {size}' for size in sizes)} |"
    for i, first in enumerate(result["batches"][0]["engines"]):
        cells = []
        for row in (batch["engines"][i] for batch in result["batches"]):
            ratio = row[
                "ratio_to_jax_fp32" if row["key"].startswith("jax") else "ratio_to_ort_fp32"
            ]
            cells.append(f"{row['images_per_s']:,.0f} ({ratio:.2f}×)")
        yield f"| {first['label']} | {' | '.join(cells)} |"


def test_the_table_of_speeds_is_that_of_the_benchmark():
    path = ROOT / "configs/results/resnet18_inference_cpu.json"
    result = json.loads(path.read_text())
    for row in speed_rows(result):
        assert row in README
    assert f"`{result['command']}`" in README
    assert f"medians of {result['rounds']} rounds" in README


def test_the_table_of_libraries_is_that_of_the_benchmarks():
    paths = [
        ROOT / f"configs/results/{name}.json"
        for name in ("quickstart_libraries", "resnet18_libraries_cpu")
    ]
    trained, timed = (json.loads(path.read_text()) for path in paths)
    for score, row in zip(trained["libraries"], timed["libraries"], strict=True):
        assert score["label"] == row["label"]
        cells = [
            row["label"],
            f"{row['kernels_trained']} of {row['kernels']}",
            f"{row['integer_products']} of {row['products']}",
            f"{row['compile_s']:.0f} s",
            f"{row['median_s']:.2f} s ({row['ratio_to_float']:.2f}×)",
            f"{100 * score['accuracy']:.2f} %",
        ]
        assert f"| {' | '.join(cells)} |" in README
    for result in (trained, timed):
        assert f"`{result['command']}`" in README
    assert timed["batch_size"] == 128
    assert timed["rounds"] == 10
    assert (trained["test_images"], trained["qat_epochs"]) == (359, 5)


def test_the_table_of_training_steps_is_that_of_the_benchmarks():
    paths = sorted((ROOT / "configs/results").glob("resnet18_training_cpu_*.json"))
    results = [json.loads(path.read_text()) for path in paths]
    makers = [r["environment"]["processor"].split()[0].removesuffix("(R)") for r in results]
    heads = [
        f"{maker}, width {r['network']['width']}, batch {r['batch_size']}"
        for maker, r in zip(makers, results, strict=True)
    ]
    assert f"| training step | {' | '.join(heads)} |" in README
    rows = [{row["label"]: row for row in result["precisions"]} for result in results]
    for label in set().union(*rows):
        name = label if label.startswith("PyTorch") else f"JAX {label}"
        found = [by_label.get(label) for by_label in rows]
        cells = [
            "–" if row is None else f"{row['images_per_s']:,.0f} ({row['ratio_to_fp32']:.2f}×)"
            for row in found
        ]
        assert f"| {name} | {' | '.join(cells)} |" in README
    for result in results:
        assert f"\n{result['command']}\n" in README
        rounds, width = result["rounds"], result["network"]["width"]
        assert f"{rounds} rounds (width {width})" in README
    ratios = [f"{r['QAT, fast']['median_s'] / r['FP32, fast']['median_s']:.2f}" for r in rows]
    assert f"takes {' and '.join(ratios[:2])} times as long" in README
    assert f"{' and '.join(ratios[2:])} times on the Intel" in README
    assert makers == ["AMD", "AMD", "Intel", "Intel"]


def test_every_config_is_in_the_readme():
    files = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert {name for name in files if f"`configs/{name}`" in README} == files


def code_blocks(heading):
    """Return the Python blocks under a heading."""
    section = re.split(r"^## ", README, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{heading}\n")]
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


class MyModel(nn.Module):
    """Stands for the user's Linen module in the README."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Encoder(nn.Module):
    """Stands for the user's module of several inputs in the README."""

    @nn.compact
    def __call__(self, tokens, positions, *, mask):
        x = nn.Embed(9, 8, name="tokens")(tokens) + nn.Embed(5, 8, name="positions")(positions)
        return nn.Dense(3, name="head")((x * mask[..., None]).mean(1))


class NNXModel(nnx.Module):
    """Stands for the user's NNX module in the README."""

    def __init__(self):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
        self.head = nnx.Linear(8, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


class EquinoxModel(eqx.Module):
    """Stands for the user's Equinox module in the README."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        self.first = eqx.nn.Linear(12, 8, key=keys[0])
        self.second = eqx.nn.Linear(8, 4, key=keys[1])

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


def test_the_library_examples_run_as_printed(tmp_path, monkeypatch, capsys):
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, 8, 8, 3)).astype(np.float32)
    names = {
        "MyModel": MyModel,
        "images": images,
        "labels": np.arange(6) % 3,
        "variables": MyModel().init(jax.random.key(0), images, train=False),
        "nnx_module": NNXModel(),
        "equinox_module": EquinoxModel(),
        "function": lambda params, x: jnp.maximum(x @ params["a"], 0) @ params["b"],
        "params": {
            "a": rng.normal(size=(12, 8)).astype(np.float32),
            "b": rng.normal(size=(8, 4)).astype(np.float32),
        },
        "rows": rng.normal(size=(16, 12)).astype(np.float32),
        "encoder": Encoder(),
        "tokens": rng.integers(0, 9, (6, 5)),
        "positions": np.tile(np.arange(5), (6, 1)),
        "mask": rng.random((6, 5)) < 0.8,
    }
    given = {key: names[key] for key in ("tokens", "positions", "mask")}
    names["encoder_variables"] = Encoder().init(jax.random.key(0), **given)
    blocks = code_blocks("Use it as a library")
    assert len(blocks) == 7
    kinds = {"linen": "images", "nnx": "images", "function": "rows", "equinox": "rows"}
    for block, (kind, inputs) in zip(blocks, kinds.items(), strict=False):
        scope = {**names, "jaxqat": jaxqat}
        exec(block, scope)
        assert (scope["check"].failures, scope["check"].differing) == ((), 0)
        assert scope["check"].codes + scope["check"].island_codes > 0
        (logits,) = runtime.InferenceSession(tmp_path / f"{kind}.onnx").run(
            None, {"images": names[inputs]}
        )
        assert logits.shape == (len(names[inputs]), *scope["graph"].output_shape)
        if kind == "linen":
            expected = scope["network"](names["images"])
            np.testing.assert_array_equal(scope["predict"](names["images"]), expected)
    for block in blocks[4:]:
        scope = {**names, "jaxqat": jaxqat}
        exec(block, scope)
    assert len(scope["graph"].inputs) == 3 and scope["scores"].shape == (6, 3)
    assert "quantized against float, 6 examples" in capsys.readouterr().out


def test_nnx_modules_and_functions_are_described_analyzed_and_verified_as_printed(capsys):
    rng = np.random.default_rng(0)
    names = {
        "jaxqat": jaxqat,
        "nnx_module": NNXModel(),
        "images": rng.normal(size=(6, 8, 8, 3)).astype(np.float32),
        "labels": np.arange(6) % 3,
        "function": lambda params, x: jnp.maximum(x @ params["a"], 0) @ params["b"],
        "params": {
            "a": rng.normal(size=(12, 8)).astype(np.float32),
            "b": rng.normal(size=(8, 4)).astype(np.float32),
        },
        "rows": rng.normal(size=(16, 12)).astype(np.float32),
        "classes": np.arange(16) % 4,
    }
    blocks = code_blocks("Train quantized")
    assert len(blocks) == 2
    for block, examples in zip(blocks, (6, 16), strict=True):
        scope = dict(names)
        exec(block, scope)
        assert (scope["check"].failures, scope["check"].differing) == ((), 0)
        assert f"quantized against float, {examples} examples" in capsys.readouterr().out


def test_the_onnx_example_names_the_classes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    normalize = lambda x: x.astype(jnp.float32) / 255  # noqa: E731
    variables = MyModel().init(jax.random.key(0), normalize(images), train=False)
    network = jaxqat.calibrate(MyModel(), variables, batches=[normalize(images)], train=False)
    labels = ["a", "b", "c"]
    graph = jaxqat.convert(
        network, normalize(images[:1]), preprocess=normalize, metadata={"labels": labels}
    )
    jaxqat.export_onnx(graph, "network.onnx", input="uint8")
    (block,) = code_blocks("The ONNX file")
    exec(block, {"images": images})
    best = np.asarray(jaxqat.make_executor(graph)(images)).argmax(-1)
    assert capsys.readouterr().out == f"{[labels[i] for i in best]}\n"


def test_the_recipe_example_is_a_recipe():
    recipe, layers = code_blocks("Recipes")
    scope: dict[str, Any] = {"jaxqat": jaxqat, "nn": nn, "nnx": nnx, "rngs": nnx.Rngs(0)}
    exec(recipe, scope)
    assert isinstance(scope["recipe"], jaxqat.Recipe)
    exec(layers, scope)
