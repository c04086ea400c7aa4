"""Networks that users might write, for `model.target`: each with a mode of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class LinenDropout(nn.Module):
    """Linen, with dropout and the argument `deterministic`; no batch norm."""

    num_classes: int
    features: tuple[int, ...] = (4,)
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, deterministic: bool):
        for i, features in enumerate(self.features):
            x = nn.relu(nn.Conv(features, (3, 3), strides=(2, 2), name=f"conv{i}")(x))
        x = x.reshape(len(x), -1)
        x = nn.Dropout(self.rate, deterministic=deterministic)(x)
        return nn.Dense(self.num_classes, name="head")(x)


class NNXBatchNorm(nnx.Module):
    """NNX, with batch norm and dropout, which `train()` and `eval()` switch; with a list."""

    def __init__(self, features: int, *, num_classes: int, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [
                nnx.Conv(1, features, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs),
                nnx.BatchNorm(features, momentum=0.5, rngs=rngs),
            ]
        )
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x):
        conv, norm = self.layers
        x = jax.nn.relu(norm(conv(x)))
        return self.head(self.dropout(jnp.mean(x, axis=(1, 2))))


class Stateless(nn.Module):
    """Linen without mode, state and dropout; its layer norm has no integer form."""

    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=(2, 2), name="conv")(x)
        x = nn.relu(nn.LayerNorm(name="norm")(x))
        return nn.Dense(self.classes, name="head")(x.reshape(len(x), -1))


class LinenBatchNorm(nn.Module):
    """Linen, with batch norm, dropout and the argument `training`."""

    num_classes: int

    @nn.compact
    def __call__(self, x, *, training: bool = False):
        x = nn.Conv(4, (3, 3), strides=(2, 2), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(not training, momentum=0.5, name="norm")(x))
        x = nn.Dropout(0.2, deterministic=not training)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(self.num_classes, name="head")(x)


def stateless(num_classes: int) -> nn.Module:
    """Return a module, as a function."""
    return Stateless(num_classes)


def fails():
    """Fail, as a factory may."""
    raise RuntimeError("no weights here")


def number():
    """Return what is no module."""
    return 3


READY = Stateless(10)
