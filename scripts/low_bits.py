"""Four and two bits with learned step sizes (LSQ): calibration alone against fine-tuning.

python scripts/low_bits.py

A small CNN on scikit-learn's digits. It takes less than a minute on a CPU, and needs
`pip install jaxqat optax scikit-learn`. LSQ: Esser et al. 2020, arXiv:1902.08153.
"""

import argparse
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
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, padding=1, name="conv2")(x))
        x = nn.relu(nn.Conv(16, (3, 3), name="conv3")(x))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


def train(apply, variables, images, labels, *, epochs, learning_rate):
    """Train parameters and, where there are some, step sizes (`quant_params`) by one optimizer."""
    trained = {name: variables[name] for name in ("params", "quant_params") if name in variables}
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, epochs * 21))
    state = optimizer.init(trained)

    @jaxqat.jit_step  # As jax.jit; on a CPU it trains convolutions faster.
    def step(variables, trained, state, x, y):
        def loss(trained):
            logits, updates = apply({**variables, **trained}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

        gradient, updates = jax.grad(loss, has_aux=True)(trained)
        changes, state = optimizer.update(gradient, state)
        return {**variables, **updates}, optax.apply_updates(trained, changes), state

    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for batch in rng.permutation(len(images))[: 21 * 64].reshape(-1, 64):
            variables, trained, state = step(
                variables, trained, state, images[batch], labels[batch]
            )
    return {**variables, **trained}


def main() -> None:
    """Train in float; quantize to few bits, without and with fine-tuning."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--epochs", type=int, default=10, help="In float; half as many in few bits."
    )
    epochs = parser.parse_args().epochs
    digits: Any = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    (x, test_x), (y, test_y) = np.split(images, [1400]), np.split(digits.target, [1400])

    def accuracy(logits: Any) -> str:
        return f"{np.mean(np.argmax(jnp.asarray(logits), -1) == test_y):.2%}"

    network = Network()
    float_apply = lambda v, x: (network.apply(v, x), {})  # noqa: E731
    variables = network.init(jax.random.key(0), x[:1])
    variables = train(float_apply, variables, x, y, epochs=epochs, learning_rate=1e-2)
    print(f"FP32: {accuracy(network.apply(variables, test_x))}")

    for recipe in ("w4a4_lsq", "w2a2_lsq"):
        # Step sizes start from calibration; then they are trained like parameters.
        calibrated = jaxqat.calibrate(
            network, variables, batches=np.split(x[:512], 8), recipe=recipe
        )
        model = jaxqat.quantize(network, recipe)
        apply = lambda v, x, m=model: m.apply(v, x, mutable=["quant"])  # noqa: E731
        tuned = train(
            apply, calibrated.variables, x, y, epochs=max(epochs // 2, 1), learning_rate=3e-3
        )
        trained = model.bind(tuned)
        graph = jaxqat.convert(trained, x[:1])
        check = jaxqat.verify(trained, graph=graph, batches=[test_x])
        scores = (accuracy(calibrated(test_x)), accuracy(jaxqat.make_executor(graph)(test_x)))
        print(
            f"{recipe}: {scores[0]} calibrated, {scores[1]} fine-tuned, integer; {check.differing} "
            f"of {check.codes:,} codes differ; {graph.size_bytes():,} bytes of weights"
        )


if __name__ == "__main__":
    main()
