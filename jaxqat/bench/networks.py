"""The network and images for a benchmark without a run: a ResNet-18 with random weights.

Speed does not depend on the values of weights. But engines can only be compared if activations
neither vanish nor saturate: so batch norm uses the statistics of a batch, and the activation
ranges are calibrated.
"""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from jaxqat.integer._convert.convert import convert
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.data import normalize
from jaxqat.pipeline.models import ModelConfig, build_model
from jaxqat.pipeline.report.samples import read_samples
from jaxqat.quant import calibrate, quantize

WIDTH = 64  # The paper's network.
IMAGE_SHAPE, CLASSES = (32, 32, 3), 10
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def random_network(width: int, *, seed: int = 0) -> IntegerGraph:
    """Return an integer ResNet-18 for CIFAR's image size, with random weights.

    Args:
        width: Channels of the first stage; the paper's network has 64.
        seed: Seed of weights and calibration images.
    """
    module = build_model(ModelConfig(width=width), CLASSES)
    model = quantize(module)
    first, second = jax.random.split(jax.random.key(seed))
    images = jax.random.normal(second, (8, *IMAGE_SHAPE))

    @jax.jit
    def initial(key):
        variables = module.init(key, images, train=False)
        _, updated = module.apply(variables, images, train=True, mutable=["batch_stats"])
        # One update moves the statistics by a tenth of the way to those of the batch.
        statistics = jax.tree.map(
            lambda old, new: old + (new - old) / 0.1,
            variables["batch_stats"],
            updated["batch_stats"],
        )
        return {"params": variables["params"], "batch_stats": statistics}

    variables = initial(first)
    return convert(
        calibrate(model, variables, batches=[images], train=False),
        images[:1],
        preprocess=lambda pixels: normalize(pixels, MEAN, STD),
        metadata={"name": f"ResNet-18, width {width}, random weights"},
    )


def run_pixels(workdir: Path) -> UInt8[np.ndarray, "n h w c"] | None:
    """Return the test images saved for a run's report; None if there are none."""
    samples = read_samples(workdir)
    return None if samples is None else samples.images


def are_usable(graph: IntegerGraph, pixels: UInt8[np.ndarray, "..."]) -> bool:
    """Return whether a network has a table for pixels and these have the shape of its input."""
    return len(pixels) > 0 and (graph.takes_uint8 and pixels.shape[1:] == graph.input_shape)


def make_images(
    graph: IntegerGraph, count: int, pixels: UInt8[np.ndarray, "..."] | None = None
) -> Float32[np.ndarray, "..."]:
    """Return contiguous float input for a network, of shape (count, *input_shape).

    Args:
        graph: The network.
        count: Number of images; `pixels` are repeated as needed.
        pixels: Usable images. Without them, the input is noise over the range of the network's
            input.
    """
    node = graph.quantize
    tensor = graph.tensors[node.output]
    if pixels is not None:
        assert node.table is not None
        pixels = np.resize(pixels, (count, *pixels.shape[1:]))
        codes = node.table[pixels, np.arange(node.table.shape[1])].astype(np.float32)
        return np.ascontiguousarray((codes - tensor.zero_point) * tensor.scale, np.float32)
    low, high = ((c - tensor.zero_point) * tensor.scale for c in (tensor.low, tensor.high))
    noise = np.random.default_rng(0).standard_normal((count, *graph.input_shape), np.float32)
    return np.clip((low + high) / 2 + noise * (high - low) / 8, low, high).astype(np.float32)
