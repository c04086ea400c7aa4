"""NNX models as people write them: none knows of jaxqat, none is adapted to it."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx


class CNN(nnx.Module):
    """Flax's MNIST tutorial: dropout and batch norm between the convolutions."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(64, 16, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.linear2 = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)  # flatten
        x = nnx.relu(self.dropout2(self.linear1(x)))
        return self.linear2(x)


class InvertedResidual(nnx.Module):
    """Expand, filter, project, and add (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, features: int, expansion: int, *, rngs: nnx.Rngs):
        hidden = features * expansion
        self.expand = nnx.Conv(features, hidden, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(hidden, rngs=rngs)
        self.depthwise = nnx.Conv(
            hidden, hidden, (3, 3), feature_group_count=hidden, use_bias=False, rngs=rngs
        )
        self.bn2 = nnx.BatchNorm(hidden, rngs=rngs)
        self.project = nnx.Conv(hidden, features, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu6(self.bn1(self.expand(x)))
        y = nnx.relu6(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.project(y))


class MobileNetV2(nnx.Module):
    """A stem, two inverted residuals, a mean and a linear layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, 6, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(6, rngs=rngs)
        self.blocks = nnx.List([InvertedResidual(6, 2, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu6(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class TransformerEncoderBlock(nnx.Module):
    """The encoder block of Flax's Vision Transformer tutorial."""

    def __init__(self, hidden_size: int, mlp_dim: int, num_heads: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(hidden_size, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            num_heads=num_heads, in_features=hidden_size, dropout_rate=0.1,
            broadcast_dropout=False, decode=False, deterministic=False, rngs=rngs,
        )  # fmt: skip
        self.norm2 = nnx.LayerNorm(hidden_size, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(hidden_size, mlp_dim, rngs=rngs),
            nnx.gelu,
            nnx.Dropout(0.1, rngs=rngs),
            nnx.Linear(mlp_dim, hidden_size, rngs=rngs),
            nnx.Dropout(0.1, rngs=rngs),
        )

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """Flax's Vision Transformer tutorial."""

    def __init__(self, *, hidden_size: int = 16, num_layers: int = 2, rngs: nnx.Rngs):
        self.patch_embeddings = nnx.Conv(
            1, hidden_size, kernel_size=(4, 4), strides=(4, 4), padding="VALID", rngs=rngs
        )
        initializer = nnx.initializers.truncated_normal(stddev=0.02)
        self.position_embeddings = nnx.Param(
            initializer(rngs.params(), (1, 5, hidden_size), jnp.float32)
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, hidden_size)))
        self.encoder = nnx.Sequential(
            *[TransformerEncoderBlock(hidden_size, 32, 2, rngs=rngs) for _ in range(num_layers)]
        )
        self.final_norm = nnx.LayerNorm(hidden_size, rngs=rngs)
        self.classifier = nnx.Linear(hidden_size, 5, rngs=rngs)

    def __call__(self, x):
        patches = self.patch_embeddings(x)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        cls_token = jnp.tile(self.cls_token[...], [x.shape[0], 1, 1])
        x = jnp.concat([cls_token, patches], axis=1)
        embeddings = self.dropout(x + self.position_embeddings[...])
        x = self.final_norm(self.encoder(embeddings))
        return self.classifier(x[:, 0])


class LSTMClassifier(nnx.Module):
    """A text classifier with a recurrent encoder."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(8, 8, rngs=rngs))
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, tokens):
        outputs: Any = self.rnn(self.embed(tokens))
        return self.head(outputs[:, -1])
