"""The comparison of libraries: what each of them trains, on which products."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from rich.console import Console
from tiny_run import run_command

from jaxqat.bench import libraries
from jaxqat.bench.libraries import FLOAT, LIBRARIES, benchmark_libraries, count_products
from jaxqat.bench.table import print_benchmark
from jaxqat.bench.training import random_dataset
from jaxqat.pipeline.networks import Networks
from jaxqat.quant._models.aqt_alone import AqtAlone

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
finished = tiny_run.finished


@pytest.fixture
def networks(small_network):
    return Networks.build(tiny_run.tiny(), random_dataset((8, 8, 1), 10, 64))


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory):
    """The comparison on a finished run: its JSON and what was printed."""
    path = tmp_path_factory.mktemp("libraries") / "libraries.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxqat.pipeline.networks.build_model", tiny_run.build_small)
        arguments = ("--what", "libraries", "--rounds", 2, "--json", path)
        assert run_command("benchmark", finished, *arguments) == 0
    return json.loads(path.read_text())


def test_aqt_alone_trains_no_convolution_and_all_others_every_kernel(measured):
    """AQT rounds a convolution's operands without a gradient (AQT issue 285)."""
    rows = {row["key"]: row for row in measured["libraries"]}
    assert list(rows) == ["float", "aqt", "jaxqat_aqt", "jaxqat", "qwix"]
    trained = {key: (row["kernels_trained"], row["kernels"]) for key, row in rows.items()}
    assert trained == {**dict.fromkeys(rows, (3, 3)), "aqt": (1, 3)}


def test_products_of_integers_are_counted(measured):
    rows = {row["key"]: row for row in measured["libraries"]}
    found = {key: (row["integer_products"], row["products"]) for key, row in rows.items()}
    # Both convolutions of jaxqat have a zero point and a padding: the sum of the weights in each
    # window is a product of its own. The first reads an input of both signs, the second a ReLU's.
    assert found.pop("jaxqat") == (5, 5)
    assert found == {"float": (0, 3), "aqt": (1, 3), "jaxqat_aqt": (3, 3), "qwix": (3, 3)}


def test_every_library_has_times_and_an_accuracy(measured):
    rows = {row["key"]: row for row in measured["libraries"]}
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["compile_s"] > 0
        assert row["ratio_to_float"] == rows["float"]["median_s"] / row["median_s"]
        assert row["accuracy"] * 40 == round(row["accuracy"] * 40)
    assert measured["test_images"] == 40
    assert measured["qat_epochs"] == 2
    assert set(measured["versions"]) == {"jax", "flax", "aqt", "jaxqat", "qwix"}


def test_jaxqat_has_the_accuracy_of_the_run_itself(measured, finished):
    """It is trained as `jaxqat train` does."""
    results = json.loads((finished / "results.json").read_text())
    (row,) = [row for row in measured["libraries"] if row["key"] == "jaxqat"]
    assert row["accuracy"] == results["qat"]["test"]["accuracy"]


def test_aqt_is_injected_into_convolutions_and_dense_layers(networks):
    """The network of AQT differs from the float one, by no more than 8 bits do."""
    module = networks.modules["fp32"]
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = module.init(jax.random.key(1), x, train=False)
    wanted = module.apply(variables, x, train=False)
    found = AqtAlone(module).apply(variables, x, train=False)
    # The signal is at least 30 times the noise of three layers of 8 bits.
    noise = float(jnp.sqrt(jnp.mean((found - wanted) ** 2) / jnp.mean(wanted**2)))
    assert 1e-4 < noise < 1 / 30
    # Outside of the injected module, the layers are as before.
    np.testing.assert_array_equal(module.apply(variables, x, train=False), wanted)


def test_a_library_that_is_not_installed_is_named(networks, monkeypatch):
    absent = libraries.Library("other", "Another", "no_such_package", FLOAT.make)
    monkeypatch.setattr(libraries, "LIBRARIES", (FLOAT, absent))
    result = benchmark_libraries(networks, batch_size=16, rounds=1)
    assert result["libraries"][1]["not_measured"] == "no_such_package is not installed"
    assert "accuracy" not in result["libraries"][0]
    output = io.StringIO()
    result |= {"what": "libraries", "rounds": 1, "threads": 2, "load_average": None}
    result["environment"] = {"platform": "cpu", "processor": "a processor", "cpu_count": 2}
    print_benchmark(result, Console(file=output, width=80))
    assert "Another is not measured: no_such_package is not installed" in output.getvalue()
    assert "accuracy" not in output.getvalue()


def test_the_forward_pass_alone_is_counted(networks):
    assert count_products(networks)["products"] == 5
    (aqt,) = [library for library in LIBRARIES if library.key == "aqt"]
    networks.modules["qat"] = aqt.make(networks.modules["fp32"], networks.experiment.quant)
    assert count_products(networks) == {"products": 3, "integer_products": 1}
