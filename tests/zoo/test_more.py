"""Models of all kinds: each trains, converts, is stored and exported; the README shows how well."""

import functools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from plain import others_long
from zoo import table
from zoo.harness import Quantized, at, check_in_onnx_runtime

import jaxqat

pytestmark = pytest.mark.slow

# In a plain `pytest`; the others are marked long.
QUICK = frozenset(
    {
        *("U-Net, bilinear", "actor-critic", "backbone of features"),
        *("LSTM", "NNX MobileNetV2", "Equinox CNN", "function"),
    }
)
RECORDED = json.loads(table.RESULTS.read_text())["models"]
# What no other machine changes; the others depend on the last bits of float32 in islands.
EXACT = ("products", "integer_products", "integer_macs_percent", "islands", "codes", "bytes")


# Of Adam; others 5e-3.
LEARNING_RATES = {"Inception": 2e-2}


def marked(names: Iterable[str]) -> list[Any]:
    names = list(names)
    return others_long(names, [name for name in names if name in QUICK])


@functools.cache
def calibrated(name: str) -> Quantized:
    return table.MODELS[name]()


def test_the_readme_has_the_recorded_table_of_all_models():
    assert list(RECORDED) == list(table.MODELS)
    readme = (table.RESULTS.parents[2] / "README.md").read_text()
    assert table.markdown(RECORDED) in readme


@pytest.mark.parametrize("name", marked(table.MODELS))
def test_a_model_converts_as_recorded_and_is_good(name):
    found = table.row(calibrated(name))
    assert {key: found[key] for key in EXACT} == {key: RECORDED[name][key] for key in EXACT}
    assert (found["differing_codes"], found["failures"]) == (0, [])
    # Quantization noise is far above float32's; the islands of other machines change little.
    assert abs(found["sqnr_db"] - RECORDED[name]["sqnr_db"]) <= 0.5 and found["sqnr_db"] > 20
    # float32 programs of islands round differently: at most some tens of operations.
    assert found["largest_onnx_difference"] <= (1e-5 if found["islands"] else 0)


@pytest.mark.parametrize("name", marked(table.MORE))
def test_a_model_trains_and_its_network_is_stored_and_exported(name, tmp_path):
    quantized = calibrated(name)
    losses, gradients = quantized.train(15, LEARNING_RATES.get(name, 5e-3))
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    gradients = quantized.weights(gradients)
    for layer in quantized.table():
        if layer.weight_bits is not None:
            assert np.abs(np.asarray(at(gradients, layer.weight_path))).max() > 0, layer.path
    graph = jaxqat.load(jaxqat.save(quantized.convert(), tmp_path / "network"))
    assert quantized.verify(graph).failures == ()
    check_in_onnx_runtime(quantized, graph)
