"""Random networks: layers, recipe and parameters are drawn by Hypothesis.

For each network, the training graph in inference mode, the NumPy interpreter and a platform compute
the same codes.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integer.models import CLASSES, assert_same, inputs, trained
from references import integer_graph

from jaxqat import Recipe, Rule, make_executor
from jaxqat.integer._execute import PallasCuda
from jaxqat.integer._execute.executor import PLATFORMS

pytestmark = pytest.mark.slow

ACTIVATIONS = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "clip": lambda x: jnp.clip(x, -0.5, 1.5),
    "none": lambda x: x,
}


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with batch norm or a bias, and an activation."""

    features: int
    window: int
    stride: int
    padding: Any
    groups: int
    dilation: int
    norm: bool
    activation: str


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block with an identity or a projected shortcut."""

    projected: bool
    norm: bool
    activation: str


@dataclasses.dataclass(frozen=True)
class Pool:
    """A max or an average pool."""

    kind: str
    window: int
    stride: int
    padding: Any


@dataclasses.dataclass(frozen=True)
class Branches:
    """A concatenation of two convolutions and their input."""

    features: int
    activation: str


class Network(nn.Module):
    """The layers in order, a flattening or an average, dense layers, and a head."""

    layers: tuple[Any, ...]
    flat: bool
    dense: tuple[str, ...]

    @nn.compact
    def __call__(self, x, train):
        for number, layer in enumerate(self.layers):
            x = self.apply_layer(layer, f"layer{number}", x)
        x = x.reshape(x.shape[0], -1) if self.flat else x.mean((1, 2))
        for number, activation in enumerate(self.dense):
            x = ACTIVATIONS[activation](nn.Dense(7, name=f"dense{number}")(x))
        return nn.Dense(CLASSES, name="head")(x)

    def conv(self, x, name, features, window, norm=False, **options):
        options = {"padding": "SAME", **options}
        conv = nn.Conv(features, (window, window), use_bias=not norm, name=name, **options)
        x = conv(x)
        if norm:
            x = nn.BatchNorm(use_running_average=True, name=f"{name}_norm")(x)
        return x

    def apply_layer(self, layer, name, x):
        match layer:
            case Conv():
                x = self.conv(
                    x, name, layer.features, layer.window, layer.norm, strides=layer.stride,
                    padding=layer.padding, feature_group_count=layer.groups,
                    kernel_dilation=layer.dilation,
                )  # fmt: skip
                return ACTIVATIONS[layer.activation](x)
            case Block():
                y = nn.relu(self.conv(x, f"{name}_a", 4, 3, layer.norm))
                y = self.conv(y, f"{name}_b", 4, 3, layer.norm)
                if layer.projected or x.shape[-1] != 4:
                    x = self.conv(x, f"{name}_c", 4, 1, layer.norm)
                return ACTIVATIONS[layer.activation](y + x)
            case Pool():
                pool = nn.max_pool if layer.kind == "max" else nn.avg_pool
                window, strides = (layer.window,) * 2, (layer.stride,) * 2
                return pool(x, window, strides, layer.padding)
            case Branches():
                parts = [self.conv(x, f"{name}_{w}", layer.features, w) for w in (1, 3)]
                parts = [ACTIVATIONS[layer.activation](part) for part in parts]
                return jnp.concatenate([*parts, x], -1)
        raise TypeError(layer)


SIZE = (7, 6)


def sizes_after(sizes, layer):
    """Return the spatial sizes of a layer's output."""
    if not isinstance(layer, Conv | Pool) or layer.padding == "SAME":
        stride = layer.stride if isinstance(layer, Conv | Pool) else 1
        return tuple(-(-size // stride) for size in sizes)
    borders = ((0, 0), (0, 0)) if layer.padding == "VALID" else layer.padding
    dilation = layer.dilation if isinstance(layer, Conv) else 1
    window = dilation * (layer.window - 1) + 1
    return tuple(
        (size + low + high - window) // layer.stride + 1
        for size, (low, high) in zip(sizes, borders, strict=True)
    )


BORDERS = ["SAME", ((0, 1), (2, 0)), ((1, 1), (1, 1))]
activations = st.sampled_from(list(ACTIVATIONS))
convolutions = st.builds(
    Conv,
    features=st.sampled_from([4, 8]),
    window=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from(BORDERS),
    groups=st.sampled_from([1, 1, 2, 4]),
    dilation=st.integers(1, 2),
    norm=st.booleans(),
    activation=activations,
)
blocks = st.builds(Block, projected=st.booleans(), norm=st.booleans(), activation=activations)
pools = st.builds(
    Pool,
    kind=st.sampled_from(["max", "mean"]),
    window=st.integers(2, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from(["VALID", "SAME", ((1, 1), (0, 1))]),
)
branches = st.builds(Branches, features=st.sampled_from([2, 4]), activation=activations)


@st.composite
def networks(draw):
    """Draw a stem without groups, and up to three more layers."""
    stem = dataclasses.replace(draw(convolutions), groups=1, stride=1)
    layers = [stem]
    channels, sizes = stem.features, sizes_after(SIZE, stem)
    for layer in draw(st.lists(st.one_of(convolutions, blocks, pools, branches), max_size=3)):
        if isinstance(layer, Conv) and channels % layer.groups:
            layer = dataclasses.replace(layer, groups=1)
        output_sizes = sizes_after(sizes, layer)
        if min(output_sizes) < 1:  # The output would be empty.
            continue
        sizes = output_sizes
        layers.append(layer)
        if isinstance(layer, Conv):
            channels = layer.features
        elif isinstance(layer, Block):
            channels = 4
        elif isinstance(layer, Branches):
            channels += 2 * layer.features
    flat, dense = draw(st.booleans()), draw(st.lists(activations, max_size=1))
    return Network(tuple(layers), flat, tuple(dense))


@st.composite
def recipes(draw):
    """Draw a recipe, mostly with 8 bits, sometimes with a rule for the first layer and the head."""
    bits = st.sampled_from([8, 8, 8, 2, 3, 4, 5, 6, 7])
    weight_ranges = st.sampled_from(["absmax", "percentile", "mse", "snr", "lsq"])
    rule = Rule(
        path="layer0.*|head",
        weight_bits=draw(bits),
        act_bits=draw(bits),
        weight_range=draw(weight_ranges),
    )
    return Recipe(
        weight_bits=draw(bits),
        act_bits=draw(bits),
        weight_granularity=draw(st.sampled_from(["per_channel", "per_tensor"])),
        activations=draw(st.sampled_from(["affine", "symmetric"])),
        act_range=draw(st.sampled_from(["ema", "minmax", "percentile", "mse", "lsq", "pact"])),
        percentile=97.0,
        rules=(rule,) if draw(st.booleans()) else (),
    )


class Interpreted(PallasCuda):
    """`PallasCuda` with kernels that run as JAX operations."""

    interpret = True


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLATFORMS, "cuda_pallas", Interpreted)
        yield


@settings(
    derandomize=True,
    deadline=None,
    max_examples=8,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    network=networks(),
    recipe=recipes(),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 10),
    platform=st.sampled_from(["cpu", "cpu", "tpu", "cuda", "cuda_pallas"]),
    fixed=st.booleans(),
)
def test_training_reference_and_lowering_compute_the_same(
    network, recipe, seed, batch, platform, fixed
):
    shape = (*SIZE, 3)
    model = trained(network, recipe, images=inputs(6, shape, seed), seed=seed)
    graph = model.convert(shape)
    images = inputs(batch, shape, seed + 1)
    assert_same(model(images), integer_graph.run(graph, images), every=False)

    if fixed:
        graph = dataclasses.replace(graph, requantization="fixed_point")
    network = make_executor(graph, platform=platform)
    every = platform != "cuda_pallas"  # It does not store the codes of fused branches.
    computed = network.codes(images), np.asarray(network(images))
    assert_same(computed, integer_graph.run(graph, images), every=every)
