"""Arithmetic and memory traffic of a network, against sums by hand."""

import pytest
from integer import graphs

from jaxqat.bench import roofline
from jaxqat.bench.roofline import Device


def resnet18_macs(width, size=32, classes=10):
    """He et al. 2015, section 4.2, with CIFAR's stem: two blocks in each of four stages."""
    total, inputs = size**2 * 9 * 3 * width, width
    for stage in range(4):
        outputs, positions = width << stage, (size >> stage) ** 2
        total += positions * 9 * outputs * (inputs + 3 * outputs)  # Four 3x3 convolutions.
        total += positions * inputs * outputs if stage else 0  # The 1x1 shortcut.
        inputs = outputs
    return total + inputs * classes


def test_the_formula_gives_the_known_count_of_resnet18():
    assert resnet18_macs(64) == 555_422_720


@pytest.mark.parametrize("width", [4, 8])
def test_macs_of_a_resnet_are_those_of_the_formula(width):
    assert roofline.macs(graphs.resnet18(width)) == resnet18_macs(width)


@pytest.mark.parametrize(
    ("case", "by_hand"),
    [
        # Positions x window x input channels of a group x output channels.
        ("chain", 72 * 9 * 3 * 8 + 20 * 9 * 8 * 12 + 20 * 9 * 12 * 12 + 240 * 5),
        (
            "depthwise",
            48 * 9 * 3 * 8  # stem, stride 2
            + 48 * 9 * 8  # depth1
            + 48 * 8 * 8  # point1
            + 48 * 9 * 16  # depth2: each input channel has two filters
            + 48 * 16 * 8  # point2
            + 160 * 5,  # head
        ),
        ("mlp", 32 * 24 + 24 * 16 + 16 * 5),
    ],
)
def test_macs_are_those_counted_by_hand(case, by_hand):
    assert roofline.macs(graphs.build(case)) == by_hand


def test_traffic_of_a_chain_is_each_tensor_written_once_and_read_once():
    graph = graphs.build("chain")
    conv1, conv2, conv3 = 9 * 8 * 8, 5 * 4 * 12, 5 * 4 * 12
    # float32 images in, float32 logits out; the reshape moves nothing.
    example = 4 * (9 * 8 * 3) + 2 * (conv1 + conv2 + conv3) + 4 * 5
    weights = 9 * 3 * 8 + 9 * 8 * 12 + 9 * 12 * 12 + 240 * 5
    arrays = weights + 8 * (8 + 12 + 12 + 5)  # A bias and a multiplier, four bytes each.
    assert roofline.traffic(graph, 1) == arrays + example
    assert roofline.traffic(graph, 7) == arrays + 7 * example


def test_traffic_of_a_residual_network_counts_additions_as_part_of_convolutions():
    graph = graphs.build("residual")
    images, stem, pool = 4 * 16 * 16 * 3, 16 * 16 * 8, 8 * 8 * 8
    identity = (pool + pool) + (pool + pool + pool)  # conv1; conv2 with the shortcut.
    after = 4 * 4 * 12
    # conv1; conv2 and the projection, one of which is stored and read by the other's addition.
    projected = (pool + after) + (after) + (pool + after) + (after + after)
    head = (after + 12) + (12 + 4 * 5)
    example = images + stem + (stem + pool) + identity + projected + head
    assert roofline.traffic(graph, 1) - graph.size_bytes() == example


def test_the_least_time_is_the_longer_of_arithmetic_and_traffic():
    graph = graphs.build("chain")
    macs, traffic = roofline.macs(graph), roofline.traffic(graph, 3)
    slow_sums = Device("", "", int8=2.0 * macs, bandwidth=1e30)
    assert roofline.least_seconds(graph, 3, slow_sums) == 3.0
    slow_memory = Device("", "", int8=1e30, bandwidth=traffic / 4)
    assert roofline.least_seconds(graph, 3, slow_memory) == 4.0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 80GB PCIe"),
        ("Tesla T4", "NVIDIA T4"),
        ("TPU v5 lite", "TPU v5e"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("cpu", None),
    ],
)
def test_only_exactly_known_devices_have_a_roofline(kind, name):
    device = roofline.known_device(kind)
    assert (device and device.name) == name
