"""More Linen models as people write them, from the papers' reference code; small in width only."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def norm(train: bool) -> Callable[..., Any]:
    return partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)


class ResNetV2(nn.Module):
    """Pre-activation ResNet (He et al. 2016, arXiv:1603.05027)."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        bn = norm(train)
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for features, stride in ((8, 1), (16, 2)):
            y = nn.relu(bn()(x))
            residual = x
            if stride != 1:
                residual = nn.Conv(features, (1, 1), (stride, stride), use_bias=False)(y)
            y = nn.Conv(features, (3, 3), (stride, stride), use_bias=False)(y)
            y = nn.relu(bn()(y))
            x = residual + nn.Conv(features, (3, 3), use_bias=False)(y)
        x = nn.relu(bn()(x))
        return nn.Dense(5)(x.mean((1, 2)))


class BottleneckD(nn.Module):
    """Bottleneck of ResNet-D (He et al. 2019, arXiv:1812.01187); with groups, of ResNeXt."""

    features: int
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x, train: bool):
        bn = norm(train)
        y = nn.relu(bn()(nn.Conv(self.features, (1, 1), use_bias=False)(x)))
        y = nn.Conv(
            self.features, (3, 3), (self.stride,) * 2, use_bias=False,
            feature_group_count=self.groups,
        )(y)  # fmt: skip
        y = nn.relu(bn()(y))
        y = bn()(nn.Conv(2 * self.features, (1, 1), use_bias=False)(y))
        if x.shape != y.shape:
            if self.stride != 1:
                x = nn.avg_pool(x, (2, 2), (2, 2), "SAME")
            x = bn()(nn.Conv(2 * self.features, (1, 1), use_bias=False)(x))
        return nn.relu(x + y)


class ResNetD(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x, train: bool = True):
        for features in (8, 8):
            x = nn.relu(norm(train)()(nn.Conv(features, (3, 3), use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        x = BottleneckD(8, 1, self.groups)(x, train)
        x = BottleneckD(8, 2, self.groups)(x, train)
        return nn.Dense(5)(x.mean((1, 2)))


class SqueezeExcite(nn.Module):
    """Hu et al. 2018 (arXiv:1709.01507)."""

    reduction: int = 4
    gate: Callable[[Any], Any] = nn.sigmoid

    @nn.compact
    def __call__(self, x):
        y = x.mean((1, 2), keepdims=True)
        y = nn.relu(nn.Conv(x.shape[-1] // self.reduction, (1, 1))(y))
        return x * self.gate(nn.Conv(x.shape[-1], (1, 1))(y))


class SEResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        bn = norm(train)
        x = nn.relu(bn()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for _ in range(2):
            y = nn.relu(bn()(nn.Conv(8, (3, 3), use_bias=False)(x)))
            y = bn()(nn.Conv(8, (3, 3), use_bias=False)(y))
            x = nn.relu(x + SqueezeExcite()(y))
        return nn.Dense(5)(x.mean((1, 2)))


class SplitAttention(nn.Module):
    """Split attention of ResNeSt (Zhang et al. 2020, arXiv:2004.08955), radix 2."""

    features: int

    @nn.compact
    def __call__(self, x, train: bool):
        bn = norm(train)
        radix = 2
        x = nn.Conv(
            radix * self.features, (3, 3), feature_group_count=radix, use_bias=False
        )(x)  # fmt: skip
        x = nn.relu(bn()(x))
        splits = jnp.split(x, radix, axis=-1)
        gap = (splits[0] + splits[1]).mean((1, 2), keepdims=True)
        gap = nn.relu(bn()(nn.Conv(8, (1, 1))(gap)))
        attention = nn.Conv(radix * self.features, (1, 1))(gap)
        attention = attention.reshape(x.shape[0], 1, 1, radix, self.features)
        attention = nn.softmax(attention, axis=3)
        return sum(attention[:, :, :, i] * split for i, split in enumerate(splits))


class ResNeSt(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.relu(norm(train)()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.relu(x + SplitAttention(8)(x, train))
        return nn.Dense(5)(x.mean((1, 2)))


class Inception(nn.Module):
    """An inception module (Szegedy et al. 2015, arXiv:1409.4842)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        one = nn.relu(nn.Conv(4, (1, 1))(x))
        three = nn.relu(nn.Conv(8, (3, 3))(nn.relu(nn.Conv(4, (1, 1))(x))))
        five = nn.relu(nn.Conv(4, (5, 5))(nn.relu(nn.Conv(2, (1, 1))(x))))
        pooled = nn.relu(nn.Conv(4, (1, 1))(nn.max_pool(x, (3, 3), (1, 1), "SAME")))
        x = jnp.concatenate([one, three, five, pooled], axis=-1)
        x = nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)
        return nn.Dense(5)(x.mean((1, 2)))


class VGG(nn.Module):
    """VGG (Simonyan, Zisserman 2015) that normalizes its images inside."""

    @nn.compact
    def __call__(self, x):
        x = (x / 255.0 - jnp.array([0.485])) / jnp.array([0.229])
        for features in (8, 16):
            for _ in range(2):
                x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(5)(x)


class DenseNet(nn.Module):
    """Huang et al. 2017 (arXiv:1608.06993)."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        bn = norm(train)
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for stage in range(2):
            for _ in range(2):
                y = nn.Conv(8, (1, 1), use_bias=False)(nn.relu(bn()(x)))
                y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(bn()(y)))
                x = jnp.concatenate([x, y], axis=-1)
            if stage == 0:
                x = nn.Conv(8, (1, 1), use_bias=False)(nn.relu(bn()(x)))
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(bn()(x))
        return nn.Dense(5)(x.mean((1, 2)))


class InvertedResidual(nn.Module):
    """MobileNetV2's, V3's and EfficientNet's block."""

    features: int
    expansion: int = 2
    stride: int = 1
    act: Callable[[Any], Any] = nn.relu6
    gate: Callable[[Any], Any] | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        bn, inputs = norm(train), x
        hidden = self.expansion * x.shape[-1]
        x = self.act(bn()(nn.Conv(hidden, (1, 1), use_bias=False)(x)))
        x = nn.Conv(
            hidden, (3, 3), (self.stride,) * 2, feature_group_count=hidden, use_bias=False
        )(x)  # fmt: skip
        x = self.act(bn()(x))
        if self.gate is not None:
            x = SqueezeExcite(gate=self.gate)(x)
        x = bn()(nn.Conv(self.features, (1, 1), use_bias=False)(x))
        return x + inputs if x.shape == inputs.shape else x


class MobileNets(nn.Module):
    """MobileNetV2, V3 (hard swish) or EfficientNet (swish), by activation and gate."""

    act: Callable[[Any], Any] = nn.relu6
    gate: Callable[[Any], Any] | None = None

    @nn.compact
    def __call__(self, x, train: bool = True):
        bn = norm(train)
        x = self.act(bn()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = InvertedResidual(8, act=self.act, gate=self.gate)(x, train)
        x = InvertedResidual(12, stride=2, act=self.act, gate=self.gate)(x, train)
        x = self.act(bn()(nn.Conv(24, (1, 1), use_bias=False)(x)))
        x = x.mean((1, 2))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(5)(x)


class ConvNeXt(nn.Module):
    """Liu et al. 2022 (arXiv:2201.03545)."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(epsilon=1e-6)(nn.Conv(8, (2, 2), (2, 2))(x))
        for _ in range(2):
            y = nn.Conv(8, (7, 7), feature_group_count=8)(x)
            y = nn.LayerNorm(epsilon=1e-6)(y)
            y = nn.gelu(nn.Dense(16)(y))
            gamma = self.param(f"gamma{_}", nn.initializers.constant(0.5), (8,))
            x = x + gamma * nn.Dense(8)(y)
        return nn.Dense(5)(nn.LayerNorm(epsilon=1e-6)(x.mean((1, 2))))


class ConvMixer(nn.Module):
    """Trockman, Kolter 2022 (arXiv:2201.09792)."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        bn = norm(train)
        x = bn()(nn.gelu(nn.Conv(8, (2, 2), (2, 2))(x)))
        for _ in range(2):
            y = bn()(nn.gelu(nn.Conv(8, (3, 3), feature_group_count=8)(x)))
            x = bn()(nn.gelu(nn.Conv(8, (1, 1))(x + y)))
        return nn.Dense(5)(x.mean((1, 2)))


class MLPMixer(nn.Module):
    """Tolstikhin et al. 2021 (arXiv:2105.01601)."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2))(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        y = nn.LayerNorm()(x)
        y = jnp.swapaxes(y, 1, 2)
        y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(16)(y)))
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.LayerNorm()(x)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(y)))
        return nn.Dense(5)(nn.LayerNorm()(x).mean(1))


class HybridViT(nn.Module):
    """A ViT behind convolutions with group normalization (BiT's stem)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)))
        x = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        n, h, w, c = x.shape
        x = x.reshape(n, h * w, c)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, h * w, c))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        y = nn.LayerNorm()(x)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(y)))
        return nn.Dense(5)(x.mean(1))


class UNet(nn.Module):
    """Ronneberger et al. 2015 (arXiv:1505.04597), with transposed convolutions or resizing."""

    resize: str | None = None

    @nn.compact
    def __call__(self, x):
        first = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.max_pool(first, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        if self.resize is None:
            x = nn.ConvTranspose(8, (2, 2), (2, 2))(x)
        else:
            n, h, w, c = x.shape
            x = nn.Conv(8, (3, 3))(jax.image.resize(x, (n, 2 * h, 2 * w, c), self.resize))
        x = jnp.concatenate([x, first], axis=-1)
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Conv(2, (1, 1))(x)


class PixelShuffle(nn.Module):
    """Sub-pixel super-resolution (Shi et al. 2016, arXiv:1609.05158)."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(8, (5, 5))(x))
        x = nn.Conv(4, (3, 3))(x)
        n, h, w, _ = x.shape
        return x.reshape(n, h, w, 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, 2 * h, 2 * w, 1)


class ActorCritic(nn.Module):
    """The network of DQN and A3C (Mnih et al.) with two heads, for images of 0..255."""

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32) / 255.0
        x = nn.relu(nn.Conv(8, (4, 4), (2, 2), name="conv1")(x))
        x = nn.relu(nn.Conv(8, (3, 3), name="conv2")(x))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(16, name="hidden")(x))
        value = nn.Dense(1, name="value")(x)
        return {"logits": nn.Dense(5, name="logits")(x), "value": value[:, 0]}


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), (2, 2))(x))
        x = nn.relu(nn.Conv(4, (3, 3), (2, 2))(x))
        x = nn.relu(nn.ConvTranspose(8, (3, 3), (2, 2))(x))
        x = nn.ConvTranspose(1, (3, 3), (2, 2))(x)
        return nn.sigmoid(x)


class AudioNet(nn.Module):
    """M5 (Dai et al. 2016, arXiv:1610.00087): one-dimensional convolutions."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        bn = norm(train)
        for features, width, stride in ((8, 9, 2), (8, 3, 1), (16, 3, 1)):
            x = nn.relu(bn()(nn.Conv(features, (width,), (stride,))(x)))
            x = nn.max_pool(x, (2,), (2,))
        return nn.log_softmax(nn.Dense(5)(x.mean(1)))


class Generator(nn.Module):
    """DCGAN's generator (Radford et al. 2016, arXiv:1511.06434)."""

    @nn.compact
    def __call__(self, z, train: bool = True):
        bn = norm(train)
        x = nn.Dense(2 * 2 * 16)(z).reshape(-1, 2, 2, 16)
        x = nn.relu(bn()(x))
        x = nn.relu(bn()(nn.ConvTranspose(8, (4, 4), (2, 2), use_bias=False)(x)))
        return nn.tanh(nn.ConvTranspose(1, (4, 4), (2, 2), use_bias=False)(x))


class Discriminator(nn.Module):
    """DCGAN's discriminator."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        bn = norm(train)
        x = nn.leaky_relu(nn.Conv(8, (4, 4), (2, 2))(x), 0.2)
        x = nn.leaky_relu(bn()(nn.Conv(16, (4, 4), (2, 2), use_bias=False)(x)), 0.2)
        return nn.Dense(1)(x.reshape(x.shape[0], -1))


class Backbone(nn.Module):
    """A small ResNet that returns the features of every stage."""

    widths: Sequence[int] = (8, 16)

    @nn.compact
    def __call__(self, x, train: bool = True):
        bn, features = norm(train), []
        for width in self.widths:
            x = nn.relu(bn()(nn.Conv(width, (3, 3), (2, 2), use_bias=False)(x)))
            y = nn.relu(bn()(nn.Conv(width, (3, 3), use_bias=False)(x)))
            x = nn.relu(x + bn()(nn.Conv(width, (3, 3), use_bias=False)(y)))
            features.append(x)
        return tuple(features)


class PReLUNet(nn.Module):
    """Slopes by channel (He et al. 2015, arXiv:1502.01852), and the largest value of a channel."""

    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = nn.Conv(features, (3, 3))(x)
            slope = self.param(f"slope{features}", nn.initializers.constant(0.25), (features,))
            x = jnp.where(x > 0, x, slope * x)
        return nn.Dense(5)(x.max((1, 2)))


class GatedMLP(nn.Module):
    """A gated linear unit (Dauphin et al. 2017, arXiv:1612.08083)."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(16)(x))
        a, b = jnp.split(nn.Dense(32)(x), 2, axis=-1)
        return nn.Dense(5)(a * nn.sigmoid(b))
