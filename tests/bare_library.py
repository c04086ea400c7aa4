"""Use only the library: quantize, train, convert, verify, save, export to StableHLO.

test_bare_library.py runs this script with the packages of every extra blocked, CI in an environment
without them. So it uses no pytest, and only the core dependencies.
"""

import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxqat

# Not listed, as Flax and JAX install them: optax, orbax-checkpoint, rich, PyYAML; SciPy.
EXTRAS = [
    "sklearn",
    "matplotlib",
    "jsonargparse",
    "jinja2",
    "PIL",
    "tensorflow_datasets",
    "array_record",
]
EXTRAS += ["onnx", "onnxruntime", "openvino", "torch"]


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), padding=1, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def main() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 3
    images = rng.normal(labels[:, None, None, None], size=(24, 8, 8, 3)).astype(np.float32)
    module = Network()
    variables = module.init(jax.random.key(0), images, train=False)
    network = jaxqat.calibrate(module, variables, batches=[images], recipe="w4a4_lsq", train=False)
    model, variables = network.model, dict(network.variables)
    trained = {name: variables.pop(name) for name in ("params", "quant_params")}

    @jax.jit
    def step(trained, rest):
        def loss(trained):
            mutable = ["batch_stats", "quant"]
            logits, updates = model.apply({**rest, **trained}, images, train=True, mutable=mutable)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            return -chosen.mean(), updates

        (value, updates), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        new = jax.tree.map(lambda p, g: p - 0.05 * g, trained, gradient)
        return new, {**rest, **updates}, value

    losses = []
    for _ in range(3):
        trained, variables, value = step(trained, variables)
        losses.append(float(value))
    assert losses[-1] < losses[0], losses

    network = model.bind({**variables, **trained}, train=False)
    assert "head" in str(jaxqat.describe(network, images))
    graph = jaxqat.convert(network, images[:1])
    check = jaxqat.verify(network, graph=graph, batches=[images])
    assert (check.differing, check.failures) == (0, ()), check.failures
    with tempfile.TemporaryDirectory() as folder:
        loaded = jaxqat.load(jaxqat.save(graph, Path(folder) / "network"))
        logits = jaxqat.make_executor(loaded)(images)
        np.testing.assert_array_equal(logits, network(images))
        jaxqat.export_stablehlo(graph, Path(folder) / "network.stablehlo")
        exported = jaxqat.load_stablehlo(Path(folder) / "network.stablehlo")
        np.testing.assert_array_equal(exported(images), logits)
        try:
            jaxqat.export_onnx(graph, Path(folder) / "network.onnx")
        except ImportError as error:
            assert "[onnx]" in str(error)  # The command depends on the source of the package.
        else:
            raise AssertionError("`onnx` is installed: this is not the bare library")
    imported = sorted(set(EXTRAS) & set(sys.modules))
    assert not imported, imported
    print("the bare library works")


if __name__ == "__main__":
    main()
