"""Post-training quantization in five lines: a trained network becomes integers, without training.

python scripts/ptq.py

A small CNN on scikit-learn's digits. It takes less than half a minute on a CPU, and needs
`pip install jaxqat optax scikit-learn`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxqat


class Network(nn.Module):
    """A trained network of yours, in the place of this one."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, padding=1, name="conv2")(x))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


def train(network, variables, images, labels, *, epochs=10):
    """Train in float; nothing here knows of quantization."""
    optimizer = optax.adam(1e-2)
    state = optimizer.init(variables)

    @jaxqat.jit_step  # As jax.jit; on a CPU it trains convolutions faster.
    def step(variables, state, x, y):
        def loss(v):
            return optax.softmax_cross_entropy_with_integer_labels(network.apply(v, x), y).mean()

        changes, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, changes), state

    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for batch in rng.permutation(len(images))[: len(images) // 64 * 64].reshape(-1, 64):
            variables, state = step(variables, state, images[batch], labels[batch])
    return variables


def main() -> None:
    """Train in float, quantize, compare."""
    digits: Any = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    (x, test_x), (y, test_y) = np.split(images, [1400]), np.split(digits.target, [1400])
    network = Network()
    variables = train(network, network.init(jax.random.key(0), x[:1]), x, y)

    # The five lines: ranges from a few batches, the integer network, what differs, the speed-up.
    calibrated = jaxqat.calibrate(network, variables, batches=np.split(x[:512], 8))
    graph = jaxqat.convert(calibrated, x[:1])
    check = jaxqat.verify(calibrated, graph=graph, batches=[test_x])
    jaxqat.save(graph, "digits_int8", overwrite=True)
    predict = jaxqat.make_executor(graph)

    for name, logits in (("FP32", network.apply(variables, test_x)), ("int8", predict(test_x))):
        accuracy = np.mean(np.argmax(jnp.asarray(logits), -1) == test_y)
        print(f"{name}: {accuracy:.2%} of {len(test_y)} test images")
    print(f"{check.differing} of {check.codes:,} codes differ from the quantized model's")
    print(f"{graph.size_bytes():,} bytes of weights")


if __name__ == "__main__":
    main()
