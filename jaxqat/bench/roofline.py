"""The least time a device needs for an integer network, by its arithmetic and memory traffic.

    seconds >= max(2 MACs / peak, bytes / bandwidth)

(Williams et al. 2009, doi:10.1145/1498765.1498785.) The bytes are counted for layers (products,
pools, and moves of codes) that run one by one, each reading its int8 tensors and weights once and
writing one int8 tensor. The first layer quantizes the images, and a residual addition is part of
the product that computes one of its inputs.
"""

import dataclasses
import math

import jax
import numpy as np

from jaxqat.integer import graph as g


@dataclasses.dataclass(frozen=True)
class Device:
    """The peak performance of a device, from its data sheet.

    Attributes:
        name: Displayed name.
        kind: JAX's `device_kind`.
        int8: Dense int8 operations per second; a multiply-accumulate counts as two.
        bandwidth: Memory bandwidth, bytes per second.
    """

    name: str
    kind: str
    int8: float
    bandwidth: float


# Kinds must match exactly: an 'H100 NVL' or a part, 'NVIDIA H200 MIG 1g.18gb', has other numbers.
DEVICES = (
    Device("NVIDIA H200", "NVIDIA H200", 1979e12, 4.8e12),
    Device("NVIDIA H100 PCIe", "NVIDIA H100 PCIe", 1513e12, 2.0e12),
    Device("NVIDIA H100 SXM", "NVIDIA H100 80GB HBM3", 1979e12, 3.35e12),
    Device("NVIDIA A100 80GB PCIe", "NVIDIA A100 80GB PCIe", 624e12, 1.935e12),
    Device("NVIDIA A100 80GB", "NVIDIA A100-SXM4-80GB", 624e12, 2.039e12),
    Device("NVIDIA A100 40GB", "NVIDIA A100-SXM4-40GB", 624e12, 1.555e12),
    Device("NVIDIA A100 40GB PCIe", "NVIDIA A100-PCIE-40GB", 624e12, 1.555e12),
    Device("NVIDIA T4", "Tesla T4", 130e12, 0.32e12),
    Device("TPU v5e", "TPU v5 lite", 394e12, 0.819e12),
    Device("TPU v6e", "TPU v6 lite", 1836e12, 1.64e12),
)


def known_device(kind: str | None = None) -> Device | None:
    """Return the device with this `device_kind`, by default this machine's; None if unknown."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    return next((device for device in DEVICES if device.kind == kind), None)


def least_seconds(graph: g.IntegerGraph, batch: int, device: Device) -> float:
    """Return the least time for a batch on a device."""
    arithmetic = 2 * macs(graph) * batch / device.int8
    return max(arithmetic, traffic(graph, batch) / device.bandwidth)


def macs(graph: g.IntegerGraph) -> int:
    """Return the multiply-accumulate operations for one image."""
    total = 0
    for node in graph.nodes:
        shapes = [graph.tensors[name].shape for name in node.inputs if name in graph.tensors]
        if isinstance(node, g.Product):
            total += math.prod(node.output_shape(shapes)[:-1]) * node.weights.size
        elif isinstance(node, g.MatMul):
            total += node.macs(shapes)
    return total


def traffic(graph: g.IntegerGraph, batch: int) -> int:
    """Return the bytes read and written for a batch, including float32 images and logits."""
    shapes = (graph.input_shape, *(output.shape for output in graph.outputs))
    example = 4 * sum(map(math.prod, shapes))
    unstored = _unstored(graph)
    for node in graph.nodes:
        if isinstance(node, g.Move) and node.kind == "reshape":
            continue  # It moves no bytes.
        stored = [
            n for n in (*node.inputs, node.output) if n in graph.tensors and n not in unstored
        ]
        example += sum(math.prod(graph.tensors[name].shape) for name in stored)
    # In memory, a weight's code takes one byte for any number of bits.
    constants = sum(
        p.weights.nbytes + p.bias.nbytes + p.multiplier.nbytes for p in graph.products()
    )
    return constants + batch * example


def _unstored(graph: g.IntegerGraph) -> set[str]:
    """Return the tensors that are never in memory, as the layer that reads them computes them."""
    names = {graph.quantize.output}
    products = {node.output for node in graph.products()}
    for node in graph.nodes:
        if isinstance(node, g.Add):
            own = [n for n in node.inputs if n in products and len(graph.readers(n)) == 1]
            names |= set(own[:1])
    return names


def parameters(graph: g.IntegerGraph) -> int:
    """Return the number of weights and biases."""
    return int(np.sum([node.weights.size + node.bias.size for node in graph.products()]))
