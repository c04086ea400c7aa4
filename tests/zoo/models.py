"""Linen models as people write them: none knows of jaxqat, none is adapted to it.

In the styles of Flax's own examples (mnist, imagenet, wmt, sst2) and of the papers' reference
code; only the widths are small. Names are Flax's automatic ones wherever the style leaves them so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class CNN(nn.Module):
    """Flax's MNIST example."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(features=8, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=16, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))  # flatten
        x = nn.Dense(features=16)(x)
        x = nn.relu(x)
        x = nn.Dense(features=5)(x)
        return x


class DepthwiseSeparable(nn.Module):
    """A depthwise and a pointwise convolution, each with batch norm and ReLU6."""

    features: int
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x, train: bool):
        channels = x.shape[-1]
        x = nn.Conv(channels, (3, 3), self.strides, feature_group_count=channels, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu6(x)
        x = nn.Conv(self.features, (1, 1), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.relu6(x)


class MobileNet(nn.Module):
    """MobileNet v1 (Howard et al. 2017, arXiv:1704.04861)."""

    num_classes: int = 5
    widths: Sequence[tuple[int, int]] = ((12, 1), (16, 2), (16, 1))

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(8, (3, 3), strides=(2, 2), use_bias=False, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu6(x)
        for features, stride in self.widths:
            x = DepthwiseSeparable(features, (stride, stride))(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, name="head")(x)


class MlpBlock(nn.Module):
    """Transformer MLP / feed-forward block."""

    mlp_dim: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, inputs, *, deterministic):
        x = nn.Dense(features=self.mlp_dim, dtype=self.dtype)(inputs)
        x = nn.gelu(x)
        x = nn.Dropout(rate=self.dropout_rate)(x, deterministic=deterministic)
        x = nn.Dense(features=inputs.shape[-1], dtype=self.dtype)(x)
        return nn.Dropout(rate=self.dropout_rate)(x, deterministic=deterministic)


class ViTBlock(nn.Module):
    """Pre-norm encoder block of the Vision Transformer."""

    num_heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, inputs):
        x = nn.LayerNorm()(inputs)
        x = nn.MultiHeadDotProductAttention(num_heads=self.num_heads)(x, x)
        x = x + inputs
        y = nn.LayerNorm()(x)
        y = MlpBlock(mlp_dim=self.mlp_dim)(y, deterministic=True)
        return x + y


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

    num_classes: int = 5
    hidden_size: int = 16
    num_layers: int = 2
    num_heads: int = 2

    @nn.compact
    def __call__(self, x):
        n = x.shape[0]
        x = nn.Conv(self.hidden_size, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(x)
        x = jnp.reshape(x, [n, -1, self.hidden_size])
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
        x = jnp.concatenate([jnp.tile(cls, [n, 1, 1]), x], axis=1)
        pos = self.param(
            "pos_embedding", nn.initializers.normal(stddev=0.02), (1, x.shape[1], x.shape[2])
        )
        x = x + pos
        for layer in range(self.num_layers):
            x = ViTBlock(self.num_heads, 2 * self.hidden_size, name=f"encoderblock_{layer}")(x)
        x = nn.LayerNorm(name="encoder_norm")(x)
        return nn.Dense(
            self.num_classes, name="head", kernel_init=nn.initializers.normal(stddev=0.1)
        )(x[:, 0])


class LSTMClassifier(nn.Module):
    """A text classifier with a recurrent encoder, as in Flax's SST-2 example."""

    vocab_size: int = 12
    embedding_size: int = 8
    hidden_size: int = 8
    num_classes: int = 5
    cell: Callable[..., nn.RNNCellBase] = nn.LSTMCell

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab_size, self.embedding_size, name="embedder")(tokens)
        outputs: Any = nn.RNN(self.cell(self.hidden_size), name="encoder")(x)
        return nn.Dense(self.num_classes, name="output_layer")(outputs[:, -1])


class EncoderLayer(nn.Module):
    """Transformer encoder layer, as in Flax's WMT example."""

    num_heads: int
    mlp_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs, mask, *, deterministic):
        x = nn.LayerNorm(dtype=self.dtype)(inputs)
        x = nn.SelfAttention(
            num_heads=self.num_heads, dtype=self.dtype, dropout_rate=0.1, use_bias=False,
            broadcast_dropout=False, deterministic=deterministic,
        )(x, mask=mask)  # fmt: skip
        x = nn.Dropout(rate=0.1)(x, deterministic=deterministic)
        x = x + inputs
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = MlpBlock(mlp_dim=self.mlp_dim, dtype=self.dtype)(y, deterministic=deterministic)
        return x + y


class TransformerEncoder(nn.Module):
    """Token 0 is padding; the mean of the others' vectors is classified."""

    vocab_size: int = 12
    emb_dim: int = 16
    num_layers: int = 2
    num_classes: int = 5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, train: bool = True):
        mask = nn.make_attention_mask(tokens > 0, tokens > 0, dtype=self.dtype)
        x = nn.Embed(self.vocab_size, self.emb_dim, dtype=self.dtype)(tokens)
        pos = self.param("pos", nn.initializers.normal(0.02), (1, tokens.shape[1], self.emb_dim))
        x = nn.Dropout(rate=0.1)(x + pos.astype(self.dtype), deterministic=not train)
        for i in range(self.num_layers):
            x = EncoderLayer(2, 2 * self.emb_dim, self.dtype, name=f"layer_{i}")(
                x, mask, deterministic=not train
            )
        x = nn.LayerNorm(dtype=self.dtype)(x)
        weights = (tokens > 0)[..., None]
        x = (x * weights).sum(1) / weights.sum(1)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)


class Siamese(nn.Module):
    """`setup`, and one module that is used twice: two halves of an image and one encoder."""

    num_classes: int = 5

    def setup(self):
        self.encoder = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(8, (3, 3)), nn.relu])
        self.classifier = nn.Dense(self.num_classes)

    def encode(self, x):
        return self.encoder(x).reshape((x.shape[0], -1))

    def __call__(self, x):
        left, right = jnp.split(x, 2, axis=2)
        return self.classifier(jnp.concatenate([self.encode(left), self.encode(right)], axis=-1))


class ScanBlock(nn.Module):
    """A residual MLP block in the form that `nn.scan` takes."""

    features: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        y = nn.relu(nn.Dense(2 * self.features)(y))
        return x + nn.Dense(self.features)(y), None


class DeepMLP(nn.Module):
    """`nn.scan` over layers whose insides are recomputed in the backward pass (`nn.remat`)."""

    features: int = 12
    num_layers: int = 3
    num_classes: int = 5

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.features)(x.reshape((x.shape[0], -1)))
        block = nn.scan(
            nn.remat(ScanBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
        )
        x, _ = block(self.features, name="layers")(x, None)
        return nn.Dense(self.num_classes)(x)


class ResidualBlock(nn.Module):
    """Layers with a common type, injected as in Flax's ImageNet example."""

    filters: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.norm()(self.conv(self.filters, (3, 3))(x))
        y = self.norm()(self.conv(self.filters, (3, 3))(nn.relu(y)))
        if residual.shape != y.shape:
            residual = self.norm(name="norm_proj")(
                self.conv(self.filters, (1, 1), name="conv_proj")(residual)
            )
        return nn.relu(residual + y)


class HalfResNet(nn.Module):
    """A residual network whose computation, or whose parameters as well, are bfloat16."""

    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    stage_filters: Sequence[int] = (12,)
    num_classes: int = 5

    @nn.compact
    def __call__(self, x, train: bool = True):
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def conv(*args, **kwargs):
            return nn.Conv(*args, use_bias=False, **types, **kwargs)

        def norm(**kwargs):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, **types, **kwargs)

        x = nn.relu(norm(name="bn_init")(conv(8, (3, 3), name="conv_init")(x)))
        x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        for filters in self.stage_filters:
            x = ResidualBlock(filters, conv, norm)(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, **types)(x)
        return jnp.asarray(x, jnp.float32)


def function_mlp(params: Any, x: jax.Array) -> jax.Array:
    """No library at all: parameters are a list of (weights, bias)."""
    x = x.reshape(x.shape[0], -1)
    for w, b in params[:-1]:
        x = jax.nn.relu(jnp.dot(x, w) + b)
    w, b = params[-1]
    return jnp.dot(x, w) + b
