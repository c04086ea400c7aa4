"""Batch norm's statistics before calibration."""

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import tiny

from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.post_training import calibrated, warn_unconverged
from jaxqat.pipeline.run.snapshots import Model

small_network = tiny_run.small_network
console = tiny_run.console


def untrained(reestimate: bool) -> tuple[Networks, Model]:
    experiment = tiny(qat__reestimate_batch_norm=reestimate, qat__calibration_batches=6)
    networks = Networks.build(experiment, load_dataset(experiment.data))
    return networks, Model(*networks.init())


@pytest.mark.usefixtures("small_network")
def test_statistics_are_estimated_anew_before_calibration_if_the_config_says_so():
    networks, model = untrained(True)
    found = calibrated(networks, model)
    estimate = networks.batch_norm(model.params, model.collections)
    assert estimate is not None
    expected = estimate.statistics
    jax.tree.map(np.testing.assert_array_equal, found.collections["batch_stats"], expected)
    ranges = networks.calibrate(model.params, {**model.collections, "batch_stats": expected})
    jax.tree.map(np.testing.assert_array_equal, found.collections["quant"], ranges["quant"])

    networks, model = untrained(False)
    found = calibrated(networks, model)
    same = (found.collections["batch_stats"], model.collections["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, *same)


@pytest.mark.usefixtures("small_network")
def test_a_warning_names_the_layers_whose_statistics_have_not_converged(console):
    networks, model = untrained(False)
    warn_unconverged(networks, model, console)
    printed = " ".join(console.file.getvalue().split())
    assert "warning:" in printed and "stem_norm (4 of 4 channels)" in printed
    assert "Set qat.reestimate_batch_norm to true" in printed


@pytest.mark.usefixtures("small_network")
def test_there_is_no_warning_if_statistics_have_converged_or_are_estimated_anew(console):
    networks, model = untrained(True)
    warn_unconverged(networks, model, console)
    statistics = calibrated(networks, model).collections["batch_stats"]
    networks, model = untrained(False)
    converged = Model(model.params, {**model.collections, "batch_stats": statistics})
    warn_unconverged(networks, converged, console)
    assert "warning" not in console.file.getvalue()
