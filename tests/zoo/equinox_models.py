"""An Equinox model as people write them, after Equinox's own MNIST example."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp


class CNN(eqx.Module):
    """Layers and plain functions in one list; an image at a time, channels first."""

    layers: list[Any]

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 6, kernel_size=3, key=keys[0]),
            eqx.nn.MaxPool2d(kernel_size=2, stride=2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(54, 12, key=keys[1]),
            jax.nn.sigmoid,
            eqx.nn.Linear(12, 5, key=keys[2]),
        ]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.transpose(x, (2, 0, 1))
        for layer in self.layers:
            x = layer(x)
        return x
