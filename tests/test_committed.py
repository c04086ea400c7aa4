"""The committed networks: they compute the recorded codes, and the README says what they reach."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import committed
import numpy as np
import pytest
import yaml

import jaxqat
from jaxqat.export import run_onnx
from jaxqat.pipeline.data import Dataset, Split

ROOT = Path(__file__).parents[1]
NETWORKS = sorted(path.parent for path in committed.RESULTS.glob("*/integer"))

networks = pytest.mark.parametrize("network", NETWORKS, ids=lambda path: path.name)


def config_of(network):
    return yaml.safe_load((network / "config.yaml").read_text())


def test_there_are_networks_of_8_4_3_and_2_bits():
    configs = map(config_of, NETWORKS)
    bits = sorted((config["model"]["depth"], config["quant"]["weight_bits"]) for config in configs)
    assert bits == [(depth, width) for depth in (18, 20) for width in (2, 3, 4, 8)]


FORMS = [
    pytest.param(network, form, marks=marks, id=f"{network.name}-{form}")
    for network in NETWORKS
    for form, marks in (
        ("network.onnx", ()),
        ("integer", pytest.mark.slow if network.name == "cifar10_narrow" else pytest.mark.long),
    )
]


@pytest.mark.parametrize(("network", "form"), FORMS)
def test_a_network_computes_the_recorded_codes(network, form):
    """In ONNX Runtime and in JAX, tensor by tensor, on 50 test images of CIFAR-10."""
    replay, folder = ROOT / "jaxqat" / "export" / "_replay.py", network / "certificate"
    command = [sys.executable, replay, network / form, "--folder", folder, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    tensors = jaxqat.load(network / "integer").tensors
    codes = [row["verdict"] for row in found["rows"] if row["name"] in tensors]
    assert codes == ["equal"] * len(tensors)
    assert not found["file_changed"] and not found["not_compared"]


@networks
def test_a_network_classifies_the_images_as_well_as_its_results_say(network):
    """In ONNX Runtime, which needs no compilation."""
    pytest.importorskip("onnxruntime")
    labels = np.loadtxt(network / "certificate" / "labels.txt", dtype=np.int64)
    with np.load(network / "certificate" / "golden.npz") as golden:
        logits, _ = run_onnx(network / "network.onnx", golden["input"])
    accuracy = json.loads((network / "results.json").read_text())["integer"]["test"]["accuracy"]
    # The correct ones of 50 are binomial: five standard deviations.
    spread = 5 * np.sqrt(accuracy * (1 - accuracy) / len(labels))
    assert len(labels) == 50 and abs((logits.argmax(-1) == labels).mean() - accuracy) < spread


CHECKPOINTS = sorted(path.parent for path in committed.RESULTS.glob("*/checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("network", CHECKPOINTS, ids=lambda path: path.name)
def test_a_checkpoint_is_that_of_the_network_beside_it(network, monkeypatch):
    """Converted on any processor, it is the network beside it to the last bit.

    It gives every code of 50 test images; the rest of the data is not read.
    """
    labels = np.loadtxt(network / "certificate" / "labels.txt", dtype=np.int64)
    with np.load(network / "certificate" / "golden.npz") as golden:
        split = Split(golden["input"], labels)
    graph = jaxqat.load(network / "integer")
    normalization: Any = graph.metadata["normalization"]
    dataset = Dataset(
        name="cifar10",
        train=split,
        validation=None,
        test=split,
        class_names=tuple(cast("list[str]", graph.metadata["labels"])),
        mean=normalization["mean"],
        std=normalization["std"],
        fingerprint=json.loads((network / "results.json").read_text())["data"],
    )
    monkeypatch.setattr("jaxqat.pipeline.opened_run.load_dataset", lambda _: dataset)
    run = jaxqat.load_run(network)
    options: Any = dict(preprocess=run.normalize, train=False)
    here = jaxqat.convert(run.model, run.variables, run.normalize(split.images[:8]), **options)
    check = jaxqat.verify(run.model, run.variables, graph=graph, batches=[split.images], **options)
    assert (check.differing, check.failures) == (0, ())
    tensors = [[dataclasses.astuple(t) for t in g.tensors.values()] for g in (here, graph)]
    assert tensors[0] == tensors[1]
    for made, stored in zip(here.nodes, graph.nodes, strict=True):
        assert type(made) is type(stored)
        for field in dataclasses.fields(made):
            value, expected = (getattr(node, field.name) for node in (made, stored))
            np.testing.assert_array_equal(value, expected, f"{made.name}: {field.name}")


@networks
def test_the_readme_has_its_accuracy(network):
    results = json.loads((network / "results.json").read_text())
    row = f"| {100 * results['integer']['test']['accuracy']:.2f} % |"
    size = f"| {results['size_bytes']['integer']:,} |"
    readme = (ROOT / "README.md").read_text()
    assert any(row in line and size in line for line in readme.splitlines())
