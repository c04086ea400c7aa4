"""Ranges on two devices, each with half of the batch, are those of one device with all of it."""

import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import two_devices as two

from jaxqat import QuantizationError, Recipe, RecipeError

pytestmark = pytest.mark.slow

# The largest tensor that is quantized: 8 examples of 4 x 4 positions and 4 channels.
LARGEST = 8 * 4 * 4 * 4
# Learned step sizes start from means of |x|, which two devices sum in another order: fewer than one
# rounding for each of n values, on both sides.
MEAN = 2 * LARGEST * 2**-24
# In training, later tensors are codes times the step sizes of up to three tensors before them. An
# offset of the same size can double the relative error.
LATER = 2 * 3 * MEAN


def lsq_tolerance(mode, key):
    if key.startswith("conv/input"):  # Nothing is quantized before it.
        return MEAN if key.endswith("/step") else 0
    if mode == "calibrate":  # In float: extremes are exact.
        return MEAN if key.endswith("/step") else 0
    return LATER


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The states that the script found, by range, mode and map."""
    path = tmp_path_factory.mktemp("devices") / "states.npz"
    # Unoptimized code compiles in a third of the time.
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, two.__file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, value in np.load(path).items():
        *case, key = name.split(" ")
        found.setdefault(tuple(case), {})[key] = value
    return found


@pytest.mark.parametrize("case", two.CASES, ids=" ".join)
def test_two_devices_observe_the_ranges_of_one(case, states):
    one, both = states[(*case[:2], "one")], states[case]
    assert set(both) == set(one)
    for key, value in one.items():
        tolerance = lsq_tolerance(case[1], key) if case[0] == "lsq" else 0
        np.testing.assert_allclose(both[key], value, rtol=tolerance, atol=0, err_msg=key)


@pytest.mark.parametrize("case", two.CASES, ids=" ".join)
def test_every_device_counts_a_batch_once(case, states):
    counts = {int(value) for key, value in states[case].items() if key.endswith("/count")}
    assert counts == {2}


def observe(axis, mode, over=None):
    """Observe on a mesh of the one device that this process has."""
    network = two.quantized("ema", axis)
    images = two.batches()[0]
    variables = network.init_quant({"params": two.parameters()}, images)

    def step(variables, images):
        return two.step(network, mode, variables, images)

    if over is None:
        return jax.eval_shape(step, variables, images)
    mesh = jax.make_mesh((1,), (over,), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(over))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=jax.sharding.PartitionSpec())
    return jax.eval_shape(mapped, variables, images)


@pytest.mark.parametrize("mode", two.MODES)
def test_an_axis_that_the_recipe_does_not_name_is_refused(mode):
    for axis in (None, "model"):
        with pytest.raises(QuantizationError, match=r"range_axis.*'data'"):
            observe(axis, mode, over="data") if axis is None else observe("data", mode, over=axis)


def test_a_pmap_over_an_axis_that_the_recipe_does_not_name_is_refused():
    network = two.quantized("ema", None)
    images = two.batches()[0]
    variables = network.init_quant({"params": two.parameters()}, images)
    with pytest.raises(QuantizationError, match=r"give `jax.pmap` an `axis_name`"):
        jax.pmap(network.calibrate, in_axes=(None, 0))(variables, images[None])


@pytest.mark.parametrize("mode", two.MODES)
def test_an_axis_that_is_not_mapped_is_refused(mode):
    with pytest.raises(QuantizationError, match=r"names 'data', which is no mapped axis here"):
        observe("data", mode)


def test_a_recipe_with_an_axis_has_the_plan_and_keys_of_one_without():
    inputs = {"params": two.parameters()}, two.batches()[0]
    plain, named = two.quantized("ema", None), two.quantized("ema", two.AXIS)
    assert plain.layers(*inputs) == named.layers(*inputs)
    np.testing.assert_equal(named.init_quant(*inputs), plain.init_quant(*inputs))


@pytest.mark.parametrize("axis", [3, "", (), ("a", "a"), ("a", 1)], ids=repr)
def test_a_wrong_axis_is_refused_by_name_and_value(axis: Any):
    with pytest.raises(RecipeError, match=r"quant.range_axis must be the name of a mapped axis"):
        Recipe(range_axis=axis)


def test_several_axes_may_be_a_list_as_in_yaml():
    several: Any = ["rows", "columns"]
    assert Recipe(range_axis=several).range_axes == ("rows", "columns")
