"""The integer network of a run: converted after training, saved in RUN/integer, used from there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from references import integer_graph
from tiny_run import STEPS, files, tiny

from jaxqat import load
from jaxqat.commands import evaluate, train
from jaxqat.integer._store.folder import ArtifactError
from jaxqat.pipeline.config import config_hash
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.metrics import classification_metrics
from jaxqat.pipeline.results import to_json
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console, finished, no_report = tiny_run.console, tiny_run.finished, tiny_run.no_report


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_integer_scores_are_those_of_the_saved_network(finished):
    """The reference is a NumPy interpreter of the saved network."""
    test = load_dataset(tiny().data).test
    graph = load(finished / "integer")
    _, logits = integer_graph.run(graph, test.images)
    names = load_dataset(tiny().data).class_names
    scores = classification_metrics(test.labels, logits, names)
    # The last product is one float32 multiplication of an exact integer: the bits are equal.
    assert results_of(finished)["integer"]["test"] == to_json(scores)


def test_its_metadata_name_its_content_and_origin(finished):
    metadata = load(finished / "integer").metadata
    dataset = load_dataset(tiny().data)
    assert metadata["labels"] == list(dataset.class_names)
    assert metadata["name"] == "tiny"
    assert metadata["config_hash"] == config_hash(tiny())
    assert metadata["data"] == dataset.fingerprint
    assert metadata["recipe"] == json.loads(json.dumps(vars(tiny().quant)))
    assert metadata["normalization"] == {
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "of": "pixels in 0..1",
    }
    assert (metadata["stage"], metadata["step"], metadata["seed"]) == ("qat", STEPS, 0)


def test_it_is_evaluated_without_any_checkpoint(run, console):
    shutil.rmtree(run / "checkpoints")
    (run / "results.json").unlink()
    result = evaluate.evaluate(run, console=console)
    assert result.stage == "integer"


def test_evaluation_gives_the_metrics_of_the_run(run, console):
    result = evaluate.evaluate(run, stage="integer", console=console)
    assert to_json(result.metrics) == results_of(run)["integer"]["test"]
    assert result.step == STEPS


@pytest.mark.parametrize("name", ["graph.json", "arrays.npz", "SHA256SUMS"])
def test_a_damaged_network_is_named_and_can_be_converted_again(
    run, finished, small_network, no_report, console, name
):
    path = run / "integer" / name
    good = path.read_bytes()
    for bad in (good[:-1], good[:50] + bytes([good[50] ^ 4]) + good[51:], None):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(ArtifactError, match=r"delete .*integer and run the same") as caught:
            evaluate.evaluate(run, console=console)
        assert str(path) in str(caught.value)
    shutil.rmtree(run / "integer")  # As the message advises.
    train.train(tiny(), run, console=console)
    assert files(run / "integer") == files(finished / "integer")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_interrupted_around_the_conversion_resumes_to_the_same_network(
    finished, run, monkeypatch, small_network, no_report, console, moment
):
    """QAT is finished, then an interrupt comes."""
    (run / "results.json").unlink()
    shutil.rmtree(run / "integer")
    make_network = train.make_network

    def interrupted(*arguments):
        if moment == "after":
            make_network(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_network", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(tiny(), run, console=console)
    assert not (run / "results.json").exists()
    assert (run / "integer").exists() is (moment == "after")
    results = train.train(tiny(), run, console=console)
    assert to_json(results)["integer"] == results_of(finished)["integer"]
    assert files(run / "integer") == files(finished / "integer")
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_deleted_network_is_converted_again_from_its_checkpoint_without_training(
    finished, run, small_network, no_report, console
):
    shutil.rmtree(run / "integer")
    with pytest.raises(RunFolderError, match=r"no integer network .* run the same `jaxqat train`"):
        evaluate.evaluate(run, console=console)
    checkpoints = files(run / "checkpoints")
    train.train(tiny(), run, console=console)
    assert "epoch 1/2" not in console.file.getvalue()
    assert results_of(run)["integer"] == results_of(finished)["integer"]
    assert files(run / "integer") == files(finished / "integer")
    assert files(run / "checkpoints") == checkpoints
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_run_that_was_never_quantized_has_no_network(run, console):
    shutil.rmtree(run / "integer")
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints" / "qat")
    with pytest.raises(RunFolderError, match=r"never quantized: there is no checkpoint of QAT"):
        evaluate.evaluate(run, console=console)


def test_a_run_whose_network_cannot_be_converted_has_all_other_results(
    tmp_path, small_network, console
):
    rule = {"path": "block_conv", "weight_bits": None, "act_bits": None}
    settings = tiny(quant={"rules": [rule]})
    results = train.train(settings, tmp_path, console=console)
    reason = "block_conv (conv): "
    assert results.conversion_error and reason in results.conversion_error
    assert to_json(results) == results_of(tmp_path)
    assert results.qat and results.qat.test.n == 40
    assert results.integer is None and results.size_bytes.integer is None
    assert results.ptq == {}
    assert not (tmp_path / "integer").exists() and not (tmp_path / "ptq").exists()
    shown = console.file.getvalue()
    assert "warning: this run has no integer network." in shown and reason in shown
    page = (tmp_path / "report.html").read_text()
    assert "This run has no integer network." in page and reason in page
    with pytest.raises(RunFolderError, match=r"could not be converted.*(\n.*)*block_conv"):
        evaluate.evaluate(tmp_path, console=console)
    assert evaluate.evaluate(tmp_path, stage="qat", console=console).metrics.n == 40
    before = files(tmp_path)
    train.train(settings, tmp_path, console=console)
    assert files(tmp_path) == before


def test_another_experiment_does_not_use_the_network(run, console):
    shutil.rmtree(run / "checkpoints")
    (run / "results.json").unlink()
    with pytest.raises(RunFolderError, match=r"seed: 0 -> 1"):
        train.train(tiny(seed=1), run, console=console)


def test_uint8_images_and_normalized_ones_have_the_same_codes(finished):
    """The table of pixel codes contains the normalization of training."""
    dataset = load_dataset(tiny().data)
    graph = load(finished / "integer")
    images = dataset.test.images
    mean, std = (np.asarray(values, np.float64) for values in (dataset.mean, dataset.std))
    codes, _ = integer_graph.run(graph, images)
    exact = (images / 255 - mean) / std / float(graph.tensors["stem_conv/input"].scale)
    steps = codes["stem_conv/input"] - float(graph.tensors["stem_conv/input"].zero_point)
    # Half a code, and a few roundings of a float32 number of at most 256 codes.
    assert np.abs(steps - exact).max() <= 0.5 + 256 * 2**-21
    assert RunFolder(finished).integer == finished / "integer"
