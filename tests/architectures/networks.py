"""Public architectures, written afresh in the style of their authors, with small widths and depths.

Names are Flax's automatic ones wherever the style leaves them so. `prepared` gives each network
weights as training leaves them, as far as quantization is concerned: statistics of batch norm that
are those of the data, and gammas and betas that differ from channel to channel.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

CLASSES = 10
SIZE = 16  # Height and width of the images.
BATCH, BATCHES = 64, 2  # Of calibration.
ModuleDef = Any
NONE = "(?!)"  # A pattern that matches no path, not even the empty one of the network itself.

# For networks that run a few times: optimizing them takes longer.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class SqueezeExcite(nn.Module):
    """A gate for each channel (Hu et al. 2018, arXiv:1709.01507, fig. 2)."""

    ratio: int = 4

    @nn.compact
    def __call__(self, x):
        y = x.mean(axis=(1, 2))
        y = nn.relu(nn.Dense(x.shape[-1] // self.ratio)(y))
        y = nn.sigmoid(nn.Dense(x.shape[-1])(y))
        return x * y[:, None, None, :]


class SEBlock(nn.Module):
    """A basic block whose branch is gated."""

    filters: int
    strides: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x):
        residual = x
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.norm()(self.conv(self.filters, (3, 3))(y))
        y = SqueezeExcite()(y)
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return nn.relu(residual + y)


class SEResNet(nn.Module):
    """SE-ResNet, with the layers injected as in Flax's ImageNet example."""

    stages: Sequence[int] = (16, 32)

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(nn.Conv, use_bias=False, padding="SAME")
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm(name="bn_init")(conv(16, (3, 3), 2, name="conv_init")(x)))
        x = SEBlock(self.stages[0], 1, conv, norm)(x)
        for filters in self.stages[1:]:
            x = SEBlock(filters, 2, conv, norm)(x)
            x = SEBlock(filters, 1, conv, norm)(x)
        return nn.Dense(CLASSES)(x.mean(axis=(1, 2)))


class ConvBlock(nn.Module):
    """Convolution, batch norm, activation. It trains when its statistics are mutable."""

    n_filters: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    groups: int = 1
    is_last: bool = False
    norm_cls: ModuleDef = partial(nn.BatchNorm, momentum=0.9)

    @nn.compact
    def __call__(self, x):
        padding = [(size // 2, size // 2) for size in self.kernel_size]
        x = nn.Conv(
            self.n_filters, self.kernel_size, self.strides, padding=padding, use_bias=False,
            feature_group_count=self.groups,
        )(x)  # fmt: skip
        x = self.norm_cls(use_running_average=not self.is_mutable_collection("batch_stats"))(x)
        return x if self.is_last else nn.relu(x)


class ResNeXtBlock(nn.Module):
    """A bottleneck with a grouped convolution (Xie et al. 2017, arXiv:1611.05431, fig. 3c)."""

    n_hidden: int
    strides: tuple[int, int] = (1, 1)
    groups: int = 4
    expansion: int = 2

    @nn.compact
    def __call__(self, x):
        y = ConvBlock(self.n_hidden, (1, 1))(x)
        y = ConvBlock(self.n_hidden, (3, 3), self.strides, self.groups)(y)
        y = ConvBlock(self.n_hidden * self.expansion, (1, 1), is_last=True)(y)
        if x.shape != y.shape:
            x = ConvBlock(y.shape[-1], (1, 1), self.strides, is_last=True)(x)
        return nn.relu(x + y)


class ResNeXt(nn.Module):
    """ResNeXt as jax-resnet has it: no argument tells training from inference."""

    stages: Sequence[int] = (16, 32)

    @nn.compact
    def __call__(self, x):
        x = ConvBlock(16, (3, 3), (2, 2))(x)
        x = ResNeXtBlock(self.stages[0])(x)
        for filters in self.stages[1:]:
            x = ResNeXtBlock(filters, (2, 2))(x)
            x = ResNeXtBlock(filters)(x)
        return nn.Dense(CLASSES)(x.mean(axis=(1, 2)))


class NormReLU(nn.Module):
    """Batch norm and ReLU, before a convolution (He et al. 2016, arXiv:1603.05027)."""

    @nn.compact
    def __call__(self, x, train):
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))


class DenseNet(nn.Module):
    """DenseNet-BC (Huang et al. 2017, arXiv:1608.06993): every layer reads all before it."""

    growth: int = 8
    blocks: Sequence[int] = (2, 2)

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(nn.Conv, use_bias=False)
        x = conv(2 * self.growth, (3, 3), 2)(x)
        for number, layers in enumerate(self.blocks):
            for _ in range(layers):
                y = conv(4 * self.growth, (1, 1))(NormReLU()(x, train))
                y = conv(self.growth, (3, 3))(NormReLU()(y, train))
                x = jnp.concatenate([x, y], axis=-1)
            if number < len(self.blocks) - 1:
                x = conv(x.shape[-1] // 2, (1, 1), name="transition")(NormReLU()(x, train))
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = NormReLU(name="last")(x, train)
        return nn.Dense(CLASSES)(x.mean(axis=(1, 2)))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and a linear bottleneck."""

    features: int
    strides: int
    expansion: int
    norm: ModuleDef

    @nn.compact
    def __call__(self, x):
        hidden = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = nn.relu6(self.norm()(nn.Conv(hidden, (1, 1), use_bias=False)(y)))
        y = nn.Conv(
            hidden, (3, 3), self.strides, padding=1, feature_group_count=hidden, use_bias=False
        )(y)
        y = nn.relu6(self.norm()(y))
        y = self.norm()(nn.Conv(self.features, (1, 1), use_bias=False)(y))
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381)."""

    # Expansion, features, repetitions and first stride: the columns of the paper's table 2.
    settings: Sequence[tuple[int, int, int, int]] = ((1, 8, 1, 1), (4, 12, 2, 1), (4, 16, 1, 2))

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu6(norm()(nn.Conv(16, (3, 3), 2, padding=1, use_bias=False)(x)))
        for expansion, features, repetitions, strides in self.settings:
            for number in range(repetitions):
                x = InvertedResidual(features, 1 if number else strides, expansion, norm)(x)
        x = nn.relu6(norm()(nn.Conv(64, (1, 1), use_bias=False)(x)))
        x = x.mean(axis=(1, 2))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(CLASSES)(x)


class DoubleConv(nn.Module):
    """Two convolutions of a U-Net, each with batch norm and ReLU."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return x


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597) with bilinear upsampling."""

    widths: Sequence[int] = (8, 16, 32)

    @nn.compact
    def __call__(self, x, train: bool = True):
        skips = []
        for width in self.widths[:-1]:
            x = DoubleConv(width)(x, train)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = DoubleConv(self.widths[-1])(x, train)
        for width, skip in zip(self.widths[-2::-1], skips[::-1], strict=True):
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "bilinear")
            x = nn.Conv(width, (1, 1))(x)
            x = DoubleConv(width)(jnp.concatenate([skip, x], axis=-1), train)
        return nn.Conv(CLASSES, (1, 1), name="head")(x)


class SharedHead(nn.Module):
    """RetinaNet's class subnet (Lin et al. 2017, arXiv:1708.02002): one for all levels."""

    width: int = 16

    def setup(self):
        self.convs = [nn.Conv(self.width, (3, 3)) for _ in range(2)]
        self.scores = nn.Conv(CLASSES, (3, 3))

    def __call__(self, x):
        for conv in self.convs:
            x = nn.relu(conv(x))
        return self.scores(x).reshape(len(x), -1, CLASSES)


class Detector(nn.Module):
    """A backbone whose levels of resolution are read by the same layers; a score per place."""

    widths: Sequence[int] = (16, 24, 32)

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        head, scores = SharedHead(), []
        for width in self.widths:
            x = nn.relu(norm()(nn.Conv(width, (3, 3), 2, padding=1, use_bias=False)(x)))
            scores.append(head(nn.Conv(head.width, (1, 1))(x)))
        return jnp.concatenate(scores, axis=1)


class DropoutMLP(nn.Module):
    """A perceptron with dropout on its input and its hidden units (Srivastava et al. 2014)."""

    widths: Sequence[int] = (64, 64, 32)

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = x.reshape(len(x), -1)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(CLASSES)(x)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network, and how it is told to train.

    Attributes:
        module: The network.
        training: Keyword arguments of training; those of inference are `inference`.
        inference: Keyword arguments of inference.
        converts: Whether `jaxqat.convert` makes an integer network of it.
        stored: Pattern of the modules whose output an integer network stores though no layer reads
            it, or though something else reads it as well: terms of residual additions, the sums,
            and inputs of average pools.
    """

    module: nn.Module
    training: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"train": True})
    inference: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"train": False})
    converts: bool = True
    stored: str = NONE


ARCHITECTURES = {
    "se_resnet": Architecture(  # A gate is a product of activations.
        SEResNet(),
        converts=False,
        stored=r"SEBlock_\d/(BatchNorm_1|SqueezeExcite_0|norm_proj)|SEBlock_\d",
    ),
    "resnext": Architecture(ResNeXt(), {}, {}, stored=r"ResNeXtBlock_\d(/ConvBlock_[23])?"),
    "densenet": Architecture(  # Batch norm behind a concatenation.
        DenseNet(), converts=False, stored="transition|last"
    ),
    "mobilenet_v2": Architecture(MobileNetV2(), stored=r"InvertedResidual_\d(/BatchNorm_2)?"),
    "unet": Architecture(UNet(), converts=False),  # Interpolation is a product with a constant.
    "shared_layers": Architecture(Detector(), converts=False),  # Its result has several products.
    "dropout_mlp": Architecture(DropoutMLP()),
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A network with its variables, and the images that calibrate and test it."""

    architecture: Architecture
    variables: Mapping[str, Any]
    calibration: Sequence[np.ndarray]
    images: np.ndarray

    @property
    def function(self) -> Callable[[Any, np.ndarray], Any]:
        """The network in inference, of variables and images."""
        return partial(self.architecture.module.apply, **self.architecture.inference)


def pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    """Images of smooth patches whose channels are correlated, with contrast of their own.

    Noise of 4x4, 8x8 and 16x16 cells, the coarse the strongest, as in the spectrum of photographs.
    """
    total = np.zeros((count, SIZE, SIZE, 3))
    for cells, strength in ((4, 1.0), (8, 0.5), (SIZE, 0.15)):
        gray = rng.normal(size=(count, cells, cells, 1))
        color = 0.4 * rng.normal(size=(count, cells, cells, 3))
        whole = np.kron(gray + color, np.ones((1, SIZE // cells, SIZE // cells, 1)))
        total += strength * whole
    contrast = rng.uniform(0.7, 1.3, (count, 1, 1, 1))
    return (contrast * total + 0.3 * rng.normal(size=(count, 1, 1, 3))).astype(np.float32)


@functools.cache
def prepared(name: str, seed: int = 0) -> Prepared:
    """Return an architecture of `ARCHITECTURES` with random weights, and images."""
    return prepare(ARCHITECTURES[name], seed)


def prepare(architecture: Architecture, seed: int, steps: int = 4) -> Prepared:
    """Return an architecture with random weights and images; `seed` decides about everything.

    Args:
        architecture: The network.
        seed: Of weights and images.
        steps: How many batches the statistics of batch norm are the mean of.
    """
    rng = np.random.default_rng(seed)
    module: Any = architecture.module
    key = {"dropout": jax.random.key(seed)}
    initialize = partial(module.init, **architecture.training)
    shapes = jax.eval_shape(initialize, {"params": jax.random.key(0), **key}, pictures(rng, 2))
    variables = jax.tree_util.tree_map_with_path(partial(_initial, rng), shapes)

    @fast_jit
    def step(variables, images):
        return module.apply(
            variables, images, mutable=["batch_stats"], rngs=key, **architecture.training
        )[1]

    if "batch_stats" in variables:
        initial = variables["batch_stats"]
        for _ in range(steps):
            variables = {**variables, **step(variables, pictures(rng, BATCH))}
        left = 0.9**steps  # The weight of the initial values, taken out as Adam does it.
        statistics = jax.tree.map(
            lambda new, old: (new - left * old) / (1 - left), variables["batch_stats"], initial
        )
        variables = {**variables, "batch_stats": statistics}
    calibration = [pictures(rng, BATCH) for _ in range(BATCHES)]
    return Prepared(architecture, variables, calibration, pictures(rng, 64))


def _initial(rng: np.random.Generator, path: Any, leaf: Any) -> Any:
    """Return a variable: kernels of He et al. 2015, gammas of both signs, biases other than 0."""
    name = path[-1].key
    if name == "kernel":
        values = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
    elif name == "scale":
        values = rng.uniform(0.5, 1.5, leaf.shape) * np.where(rng.random(leaf.shape) < 0.1, -1, 1)
    elif name == "bias":
        values = rng.normal(0, 0.3, leaf.shape)
    else:
        values = np.full(leaf.shape, float(name == "var"))
    return jnp.asarray(values, leaf.dtype)
