"""Small Flax models of many kinds, with parameters as after training, and their codes.

`MODELS` lists them. `Trained` is a quantized and calibrated model: in inference mode, the integer
network must compute the same codes and logits.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxqat
from jaxqat.pipeline.models.resnet import ResNet

CLASSES = 5


def norm(train, name):
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)


class Vgg(nn.Module):
    """Convolutions with biases and no batch norm, max pools with and without padding."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(6, (3, 3), padding="SAME", name="conv1")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), padding=((1, 0), (2, 1)), name="conv2")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(9, name="dense1")(x))
        return nn.Dense(CLASSES, name="head")(x)


class Mlp(nn.Module):
    """Dense layers, the second without ReLU."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(12, name="dense1")(x))
        x = nn.Dense(8, name="dense2")(x)
        return nn.Dense(CLASSES, name="head", use_bias=False)(x)


class Mobile(nn.Module):
    """Depthwise and pointwise convolutions, ReLU6, a linear bottleneck with a shortcut."""

    @nn.compact
    def __call__(self, x, train):
        def conv(features, window, name, **options):
            return nn.Conv(features, (window, window), use_bias=False, name=name, **options)

        x = nn.relu6(norm(train, "norm0")(conv(6, 3, "stem", strides=2, padding="SAME")(x)))
        short = norm(train, "norm1")(conv(4, 1, "point1")(x))
        y = nn.relu6(norm(train, "norm2")(conv(8, 1, "expand")(short)))
        depthwise = conv(8, 3, "depth", feature_group_count=8, padding=1)
        y = nn.relu6(norm(train, "norm3")(depthwise(y)))
        x = norm(train, "norm4")(conv(4, 1, "point2")(y)) + short
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Sequence(nn.Module):
    """`nn.Sequential`, an average pool, asymmetric padding, concatenation with a mirror image."""

    @nn.compact
    def __call__(self, x, train):
        layers = [
            nn.Conv(6, (3, 3)),
            nn.relu,
            lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
            nn.Conv(8, (3, 3), padding=((1, 0), (2, 1))),
            nn.relu,
            lambda x: jnp.concatenate([x, x[:, ::-1]], -1),
            lambda x: x.mean((1, 2)),
            nn.Dense(CLASSES),
        ]
        return nn.Sequential(layers)(x)


class Grouped(nn.Module):
    """Groups, a channel multiplier, dilation, and stride 2 with "SAME", which pads one side."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=4, strides=2, name="groups")(x))
        x = nn.Conv(12, (3, 3), feature_group_count=6, kernel_dilation=2, name="pairs")(x)
        x = nn.Conv(24, (2, 2), feature_group_count=12, name="multiple")(nn.relu(x))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Residual(nn.Module):
    """An identity shortcut and a projected one, with batch norm after the convolutions."""

    @nn.compact
    def __call__(self, x, train):
        def conv(features, name, **options):
            return nn.Conv(features, (3, 3), padding=1, use_bias=False, name=name, **options)

        x = nn.relu(norm(train, "norm0")(conv(6, "stem")(x)))
        x = nn.relu(x + norm(train, "norm1")(conv(6, "conv1")(x)))
        y = norm(train, "norm2")(conv(8, "conv2", strides=2)(x))
        short = nn.Conv(8, (1, 1), strides=2, use_bias=True, name="project")(x)
        x = nn.relu(y + short)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Series(nn.Module):
    """One spatial axis."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = nn.relu(nn.Conv(8, (5,), strides=2, name="conv1")(x))
        x = nn.relu(norm(train, "norm")(nn.Conv(6, (3,), padding="VALID", name="conv2")(x)))
        return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))


class Inception(nn.Module):
    """Concatenated branches, one of them a pool of the tensor that the others read."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        wide = nn.relu(norm(train, "norm")(nn.Conv(4, (3, 3), name="wide")(x)))
        narrow = nn.Conv(5, (1, 1), name="narrow")(x)
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        x = jnp.concatenate([wide, narrow, pooled], -1)
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, padding=1, name="after")(x))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class PreActivation(nn.Module):
    """Batch norm and ReLU before the convolutions: sums of which two layers read other parts."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        y = nn.Conv(6, (3, 3), use_bias=False, name="conv1")(nn.relu(norm(train, "norm1")(x)))
        x = x + y
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID", name="conv2")(nn.relu(x)))
        return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))


MODELS: dict[str, nn.Module] = {
    "vgg": Vgg(),
    "mlp": Mlp(),
    "mobile": Mobile(),
    "sequence": Sequence(),
    "grouped": Grouped(),
    "residual": Residual(),
    "series": Series(),
    "inception": Inception(),
    "pre-activation": PreActivation(),
}


def resnet18():
    return ResNet(depth=18, width=4, num_classes=CLASSES, stem="cifar")


def inputs(count, shape=(8, 8, 3), seed=0):
    """Return float images with correlated neighbours."""
    x = np.random.default_rng(seed).normal(size=(count, *shape))
    for axis in range(1, x.ndim - 1):
        x = x + np.roll(x, 1, axis)
    return (x / x.std()).astype(np.float32)


def randomized(variables, seed=0):
    """Draw all parameters, including signs and zeros that initializers do not give.

    A third of each batch norm's gammas is negative, and the last one is 0.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, value):
        name = path[-1].key
        if name == "scale":
            gamma = rng.uniform(0.4, 1.5, value.shape) * rng.choice([1, 1, -1], value.shape)
            gamma[0], gamma[-1] = -abs(gamma[0]), 0.0
            return gamma.astype(np.float32)
        if name in ("bias", "mean"):
            return rng.normal(0, 0.3, value.shape).astype(np.float32)
        if name == "var":
            return rng.uniform(0.5, 2.0, value.shape).astype(np.float32)
        return rng.normal(0, np.sqrt(2 / np.prod(value.shape[:-1])), value.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, variables)


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A quantized model and its variables, ranges included."""

    model: Any
    variables: Any

    def convert(self, shape=(8, 8, 3), **options):
        """Return its integer network."""
        images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        return jaxqat.convert(self.model, self.variables, images, train=False, **options)

    @functools.cached_property
    def _run(self):
        @jax.jit
        def run(variables, images):
            evaluator = self.model.record(variables, images, train=False)
            codes = {"/".join(key): codes.codes for key, codes in evaluator.codes.items()}
            return codes, self.model.apply(variables, images, train=False)

        return run

    def __call__(self, images):
        """Return codes by tensor, and logits, of the training graph in inference mode."""
        codes, logits = self._run(self.variables, images)
        return {name: np.asarray(values) for name, values in codes.items()}, np.asarray(logits)


def trained(module, recipe: Any = "int8", *, images=None, seed=0) -> Trained:
    """Quantize a module with random parameters by a recipe, and calibrate it on images."""
    images = inputs(8) if images is None else images
    shapes = jax.eval_shape(
        functools.partial(module.init, train=False), jax.random.key(0), images[:1]
    )
    variables = dict(randomized(shapes, seed))
    model = jaxqat.quantize(module, recipe)
    empty = model.init_quant(variables, images, train=False)
    calibrate = jax.jit(functools.partial(model.calibrate, train=False))
    # The parameters stay NumPy arrays, which can be converted to float64.
    return Trained(model, {**calibrate(empty, images), **variables})


def assert_same(actual, expected, *, every=True):
    """Compare the codes and results of two networks bit by bit.

    Args:
        actual: Codes by tensor, and the result.
        expected: The same for the other network.
        every: Whether both must have the same tensors; otherwise `expected` may have more.
    """
    (codes, result), (expected_codes, expected_result) = actual, expected
    assert codes and set(codes) <= set(expected_codes)
    assert not every or set(codes) == set(expected_codes)
    for name, wanted in codes.items():
        np.testing.assert_array_equal(np.asarray(wanted), expected_codes[name], err_msg=name)
    # As bits, so that NaNs and the sign of zeros count.
    left, right = (np.asarray(x, np.float32).view(np.uint32) for x in (result, expected_result))
    np.testing.assert_array_equal(left, right)


# Functions of (parameters, images) that trace in milliseconds.

WEIGHTS = {
    name: np.random.default_rng(sum(shape)).normal(0, 0.3, shape).astype(np.float32)
    for name, shape in {"a": (3, 3, 3, 8), "b": (3, 3, 8, 8), "head": (8, 5)}.items()
}


def conv(x, w, padding: Any = "SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=numbers, **options)


def calibrated(function, recipe: Any = "int8"):
    """Quantize a function of `WEIGHTS` and images; return it and its calibrated variables."""
    model = jaxqat.quantize(function, recipe)
    variables = model.init_quant({"params": WEIGHTS}, inputs(4))
    return model, {**jax.jit(model.calibrate)(variables, inputs(4)), "params": WEIGHTS}
