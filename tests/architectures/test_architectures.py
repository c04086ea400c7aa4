"""Public architectures after calibration alone: as near to float as 8 bits allow.

That training and the integer network have the same codes says nothing about how good the codes are.
So the logits are compared with float, and the floor comes from a quantizer in float that shares no
code with the library (`reference`).

The floor. With inputs of layers and weights on 8-bit grids, the reference has a certain signal to
quantization noise ratio (SQNR). jaxqat rounds more tensors, so that a network can run on integers
throughout: the terms of residual additions, the sum that the next shortcut reads, inputs of average
pools. If each of n tensors added noise of the same power, m more of them would cost
10 log10((n + m) / n) dB: 1.0 dB for SE-ResNet, with n = 30 and m = 8. They do not: what is added to
the shortcut reaches the logits undiminished, what a layer reads inside a branch does not. The cost
there is 1.3 dB (int8) and 2.1 dB (int8_symmetric).
So the reference rounds these tensors too, wherever a module puts them out (`Architecture.stored`).

The margin. What is left are two draws of noise of the same power, whose ratio differs from 1 by
chance. Over 3 seeds of weights and images and both presets, the difference of the two SQNRs had a
standard deviation of 0.33 dB (24 values) for the four networks with `stored` tensors, some of which
the reference rounds at another place (before a ReLU, for one), and of 0.035 dB (18 values) for the
three others, where both round the same tensors. The margins are three and four times these.
"""

import functools

import numpy as np
import pytest
from architectures.networks import ARCHITECTURES, NONE, fast_jit, prepared
from architectures.reference import Quantizer
from plain import others_long
from references.sqnr import decibels

import jaxqat

pytestmark = pytest.mark.slow

RECIPES = ("int8", "int8_symmetric")
MARGIN_DB, MARGIN_OF_THE_SAME_TENSORS_DB = 1.0, 0.14


@functools.cache
def reference(name: str) -> Quantizer:
    network = prepared(name)
    stored = network.architecture.stored
    return Quantizer(network.function, network.variables, network.calibration, stored)


@functools.cache
def float_result(name: str) -> np.ndarray:
    network = prepared(name)
    return np.asarray(fast_jit(network.function)(network.variables, network.images))


@functools.cache
def calibrated(name: str, recipe: str) -> jaxqat.BoundModel:
    network = prepared(name)
    return jaxqat.calibrate(
        network.architecture.module, network.variables, batches=network.calibration,
        recipe=recipe, **network.architecture.inference,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", others_long(RECIPES, ["int8"]))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_new_images_are_as_near_to_float_as_the_reference_has_them(name, recipe):
    network, real = prepared(name), float_result(name)
    found = decibels(real, fast_jit(calibrated(name, recipe))(network.images))
    expected = reference(name)(network.images, symmetric=recipe == "int8_symmetric")
    same = network.architecture.stored == NONE
    margin = MARGIN_OF_THE_SAME_TENSORS_DB if same else MARGIN_DB
    assert found >= decibels(real, expected) - margin


@pytest.mark.parametrize("recipe", others_long(RECIPES, ["int8"]))
@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.converts])
def test_no_code_of_its_integer_network_differs(name, recipe):
    network = prepared(name)
    images = network.images[:8]
    model = calibrated(name, recipe)
    graph = jaxqat.convert(model, images)
    check = jaxqat.verify(model, graph=graph, batches=[images])
    assert check.codes > 0
    assert (check.differing, check.differing_results) == (0, 0)
