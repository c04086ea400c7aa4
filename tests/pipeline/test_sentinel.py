"""The sentinel of training: a wrong integer product is found and named; no bit changes."""

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import STEPS, STEPS_PER_EPOCH, files, signal_at, tiny

from jaxqat.commands import train
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import restore_model
from jaxqat.pipeline.sentinel import LAYERS, Sentinel, WrongSumsError
from jaxqat.pipeline.training import DEFAULT, FAST, init_state, make_optimizer
from jaxqat.pipeline.training.stop import Stopped
from jaxqat.quant._numerics import by_numpy
from jaxqat.quant._numerics.products import Convolution

pytestmark = pytest.mark.slow

finished, console = tiny_run.finished, tiny_run.console
small_network, no_report = tiny_run.small_network, tiny_run.no_report


@pytest.fixture
def state(finished, small_network):
    """The networks of a finished run, and the state after its QAT."""
    networks = Networks.build(tiny(), load_dataset(tiny().data))
    model = restore_model(networks, RunFolder(finished), "qat")
    optimizer = make_optimizer(tiny().qat.optimizer, total_steps=10, steps_per_epoch=5)
    return networks, init_state(model.params, model.collections, optimizer)


def break_block(monkeypatch):
    """Make one sum of the layer with as many inputs as outputs wrong by one."""
    right = Convolution.accumulate

    def wrong(self, codes, weights, largest=128 * 128):
        total = right(self, codes, weights, largest)
        *_, inputs, outputs = weights.shape
        if inputs != outputs or codes.shape[-1] == 1:  # `zero_sums` multiplies ones.
            return total
        return total.at[1, 0, 0, 0].add(1)

    monkeypatch.setattr(Convolution, "accumulate", wrong)
    jax.clear_caches()


@pytest.mark.parametrize("compilation", [DEFAULT, FAST], ids=lambda c: c.name)
def test_every_layer_is_compared_within_a_few_epochs(state, monkeypatch, compilation):
    networks, trained = state
    compared, accumulate = [], by_numpy.accumulate

    def recorded(product, codes, weights):
        compared.append(weights.shape)
        return accumulate(product, codes, weights)

    monkeypatch.setattr(by_numpy, "accumulate", recorded)
    sentinel = Sentinel(networks, compilation, trained)
    layers = networks.describe()
    for epoch in range(1, -(-len(layers) // LAYERS) + 1):
        sentinel.check(trained, epoch)
    shapes = {
        np.shape(trained.params[name]["kernel"]) for name in trained.params if "norm" not in name
    }
    assert set(compared) >= shapes


def test_a_wrong_sum_is_found_and_its_layer_named(state, monkeypatch):
    networks, trained = state
    break_block(monkeypatch)
    sentinel = Sentinel(networks, DEFAULT, trained)
    with pytest.raises(WrongSumsError, match=r"qat: block_conv: 1 of \d+ integer sums") as caught:
        for epoch in range(1, 3):
            sentinel.check(trained, epoch)
    assert "jaxqat doctor" in str(caught.value)


def test_a_run_with_a_wrong_product_stops_before_it_is_saved(
    tmp_path, monkeypatch, small_network, no_report, console
):
    break_block(monkeypatch)
    with pytest.raises(WrongSumsError, match="block_conv"):
        train.train(tiny(qat__sentinel=True), tmp_path / "run", console=console)
    folder = RunFolder(tmp_path / "run")
    assert folder.has_checkpoints("fp32")
    assert not (tmp_path / "run" / "integer").exists()


def test_the_sentinel_changes_no_bit_and_may_be_turned_off_in_between(
    finished, tmp_path, monkeypatch, small_network, no_report, console
):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, STEPS + STEPS_PER_EPOCH + 2)
        train.train(tiny(qat__sentinel=True), tmp_path / "run", console=console)
    assert "compiling the check of its integer products" in console.file.getvalue()
    train.train(tiny(qat__sentinel=False), tmp_path / "run", console=console)
    for part in ("integer", "ptq"):
        assert files(tmp_path / "run" / part) == files(finished / part)
