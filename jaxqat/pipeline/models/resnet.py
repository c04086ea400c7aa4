"""ResNets (He et al. 2015, arXiv:1512.03385): -18, -34 and -50 with a CIFAR or an ImageNet stem,
and those of three stages for CIFAR-10, ResNet-20 to -56.

Layouts are NHWC for activations and HWIO for kernels. Layer names are explicit because checkpoints
store them and quantization rules match them: 'stem_conv', 'stage2/block0/conv1',
'stage2/block0/shortcut_conv', 'head'. Padding is explicit because "SAME" pads one side only at
stride 2, unlike the PyTorch networks whose accuracy and weights this one is compared with.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxqat.pipeline.settings.model import CIFAR_DEPTHS, ModelConfig

# Blocks in each stage (He et al. 2015, table 1); 50 layers use bottlenecks. Those of three stages
# have 6n + 2 layers (section 4.2).
STAGE_SIZES = {
    **{18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)},
    **{depth: ((depth - 2) // 6,) * 3 for depth in CIFAR_DEPTHS},
}
BOTTLENECK_DEPTHS = (50,)
BOTTLENECK_EXPANSION = 4

# Fan-out keeps the gradient's variance through ReLU layers (He et al. 2015, arXiv:1502.01852,
# section 2.2). Not truncated, as in torchvision: kaiming_normal_(mode="fan_out").
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for nn.Linear.
linear_fan_in = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def _conv(features: int, kernel: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    """Return a square convolution without bias; it keeps the size or divides it by the stride."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((kernel // 2, kernel // 2),) * 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=kaiming_fan_out,
        name=name,
    )


def _norm(train: bool, dtype: Any, name: str) -> nn.BatchNorm:
    """Return a batch norm with PyTorch's constants: its momentum 0.1 is a decay of 0.9 here.

    Statistics and parameters are float32 for every `dtype`.
    """
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, fig. 5 left)."""

    features: int
    stride: int
    dtype: Any = jnp.float32
    shortcut: str = "conv"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h2 w2 f"]:
        """Return relu(branch(x) + shortcut(x)), of ceil(size / stride) rows and columns."""
        conv, norm = partial(_conv, dtype=self.dtype), partial(_norm, train, self.dtype)
        y = conv(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = norm(name="norm2")(conv(self.features, 3, 1, name="conv2")(y))
        changes = self.stride != 1 or x.shape[-1] != self.features
        if changes and self.shortcut == "pad":
            more = self.features - x.shape[-1]
            x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0),) * 3 + ((0, more),))
        elif changes:
            x = conv(self.features, 1, self.stride, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(y + x)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2015, fig. 5 right).

    The stride is in the 3x3 convolution, as in torchvision ("ResNet v1.5"). In the paper it is in
    the first 1x1, which then reads only a quarter of its input.
    """

    features: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h2 w2 f4"]:
        """Return relu(branch(x) + shortcut(x)), of 4 * features channels."""
        conv, norm = partial(_conv, dtype=self.dtype), partial(_norm, train, self.dtype)
        out = BOTTLENECK_EXPANSION * self.features
        y = nn.relu(norm(name="norm1")(conv(self.features, 1, 1, name="conv1")(x)))
        y = conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y))
        y = norm(name="norm3")(conv(out, 1, 1, name="conv3")(y))
        if self.stride != 1 or x.shape[-1] != out:
            x = conv(out, 1, self.stride, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(y + x)


class Stage(nn.Module):
    """Blocks of equal width, named block0, block1, ...; the first one has the stride."""

    block: Any  # Takes features, stride and dtype.
    size: int
    features: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h2 w2 f"]:
        """Apply the blocks in order."""
        for i in range(self.size):
            stride = self.stride if i == 0 else 1
            block = self.block(self.features, stride, self.dtype, name=f"block{i}")
            x = block(x, train)
        return x


class ResNet(nn.Module):
    """Map images to class logits; variables are {'params', 'batch_stats'}.

    `dtype` is the precision of convolutions and activations. Parameters, batch statistics and the
    head are always float32: bfloat16 has too few digits to rank close logits.
    """

    depth: int = 18
    width: int = 64
    num_classes: int = 10
    stem: str = "cifar"
    dtype: Any = jnp.float32
    shortcut: str = "conv"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n k"]:
        """Return float32 logits.

        Args:
            x: Normalized images; the CIFAR stem accepts any size from 1x1 pixel.
            train: Whether batch norm uses the statistics of this batch and updates the averages.
        """
        x = x.astype(self.dtype)
        kernel, stride = (3, 1) if self.stem == "cifar" else (7, 2)
        x = _conv(self.width, kernel, stride, self.dtype, "stem_conv")(x)
        x = nn.relu(_norm(train, self.dtype, "stem_norm")(x))
        if self.stem == "imagenet":
            padding: Any = ((1, 1), (1, 1))  # Flax accepts pairs but annotates only str.
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)

        block: Any = partial(BasicBlock, shortcut=self.shortcut)
        if self.depth in BOTTLENECK_DEPTHS:
            block = BottleneckBlock
        for i, size in enumerate(STAGE_SIZES[self.depth]):
            features, stride = self.width * 2**i, 1 if i == 0 else 2
            x = Stage(block, size, features, stride, self.dtype, name=f"stage{i + 1}")(x, train)

        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        head = nn.Dense(self.num_classes, dtype=jnp.float32, kernel_init=linear_fan_in, name="head")
        return head(x)


def build_resnet(config: ModelConfig, num_classes: int, dtype: Any = jnp.float32) -> ResNet:
    """Return the ResNet of a configuration.

    Args:
        config: Depth, width, stem and shortcuts.
        num_classes: Number of logits, 2 or more.
        dtype: Compute precision, float32 or bfloat16; parameters are float32 for both.

    Raises:
        ValueError: If `num_classes` is below 2.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be 2 or more, got {num_classes!r}.")
    return ResNet(
        depth=config.depth,
        width=config.width,
        num_classes=num_classes,
        stem=config.stem,
        dtype=dtype,
        shortcut=config.shortcut,
    )


def probe_block(
    config: ModelConfig, image_shape: tuple[int, ...], dtype: Any = jnp.float32
) -> tuple[BasicBlock, tuple[int, int, int]]:
    """Return a block as wide as the first stage, and the shape of an image's activations there.

    It stands for the network in measurements of speed.
    """
    stride = 1 if config.stem == "cifar" else 4
    rows, columns = (math.ceil(size / stride) for size in image_shape[:2])
    return BasicBlock(config.width, 1, dtype), (rows, columns, config.width)
