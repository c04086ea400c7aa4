"""A model of one's own, from FP32 to an int8 ONNX file.

python scripts/custom_model.py model.onnx

A small residual network on scikit-learn's digits: trained in float, fine-tuned on integers,
converted, verified code by code, exported. It takes less than a minute on a CPU, and needs
`pip install 'jaxqat[onnx]'`.
"""

import argparse
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxqat


class Network(nn.Module):
    """Nothing in it knows of quantization."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(16, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm1")(x))
        y = nn.Conv(16, (3, 3), padding=1, use_bias=False, name="conv")(x)
        y = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm2")(y)
        return nn.Dense(10, name="head")(nn.relu(x + y).mean((1, 2)))


def normalize(pixels):
    """uint8 pixels as the network's input."""
    return (pixels.astype(jnp.float32) / 255 - 0.3) / 0.38


def train(apply, variables, images, labels, *, epochs, learning_rate):
    """SGD over the parameters; what `apply` updates is put back into the variables."""
    optimizer = optax.sgd(learning_rate, momentum=0.9)
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, state, x, y):
        def loss(params):
            logits, updates = apply({**variables, "params": params}, normalize(x))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

        gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, state = optimizer.update(gradient, state)
        params = optax.apply_updates(variables["params"], changes)
        return {**variables, **updates, "params": params}, state

    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(images)), len(images) // 64):
            variables, state = step(variables, state, images[batch], labels[batch])
    return variables


def main() -> None:
    """Train, fine-tune, convert, verify, export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="The ONNX file to write.")
    parser.add_argument("--epochs", type=int, default=30, help="In float; a third on integers.")
    options = parser.parse_args()

    digits: Any = load_digits()
    images = np.asarray(digits.images * (255 / 16), np.uint8)[..., None]
    labels = np.asarray(digits.target)
    (x, test_x), (y, test_y) = np.split(images, [1400]), np.split(labels, [1400])

    network = Network()
    variables = network.init(jax.random.key(0), normalize(x[:1]), train=False)
    float_apply = lambda v, x: network.apply(v, x, train=True, mutable=["batch_stats"])  # noqa: E731
    variables = train(float_apply, variables, x, y, epochs=options.epochs, learning_rate=0.1)
    logits: Any = network.apply(variables, normalize(test_x), train=False)
    print(f"FP32: {np.mean(np.argmax(logits, -1) == test_y):.2%} of {len(test_y)} test images")

    batches = [normalize(x[i : i + 64]) for i in range(0, 512, 64)]
    calibrated = jaxqat.calibrate(network, variables, batches=batches, train=False)
    print(jaxqat.describe(calibrated, normalize(x[:1])))
    # Batch norm is frozen, so that what is trained is what will be deployed, and ranges move.
    model = jaxqat.quantize(network)
    apply = lambda v, x: model.apply(v, x, train=False, mutable=["quant"])  # noqa: E731
    epochs = max(options.epochs // 3, 1)
    variables = train(apply, calibrated.variables, x, y, epochs=epochs, learning_rate=0.001)
    trained = model.bind(variables, train=False)

    graph = jaxqat.convert(trained, normalize(x[:1]), preprocess=normalize)
    logits = jaxqat.make_executor(graph)(test_x)
    print(f"integer: {np.mean(np.argmax(logits, -1) == test_y):.2%} of {len(test_y)} test images")
    check = jaxqat.verify(trained, graph=graph, batches=[test_x], preprocess=normalize)
    print(f"{check.differing} of {check.codes:,} codes differ from the trained network's")
    path = jaxqat.export_onnx(graph, options.output, input="uint8", overwrite=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
