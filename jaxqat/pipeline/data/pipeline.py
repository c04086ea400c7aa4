"""Device-side input: the order of an epoch, augmentation, normalization, evaluation batches.

The split lies on the device as uint8. A training step gathers its images by index and calls the
functions here inside the same compiled program; the host does nothing within an epoch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8

from jaxqat.pipeline.data.arrays import Split

# Folded into the key of the shuffle, so that it shares no stream with other uses of the same seed.
SHUFFLE_STREAM = 0x5F0F


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to training images (config key `augment`)."""

    crop_padding: int = 4
    """Zero pixels added to each side before a random crop to the old size; 0 for no crop."""

    flip: bool = True
    """Whether to mirror each image left to right with probability one half."""

    def __post_init__(self):
        if self.crop_padding < 0:
            raise ValueError(f"augment.crop_padding must be >= 0, got {self.crop_padding!r}.")


def epoch_permutation(seed: int | Array, epoch: int | Array, n: int) -> Int32[Array, " n"]:
    """Order of the training images in an epoch: a pure function of seed and epoch.

    A run that resumes at an epoch needs no state of its own to see the same images again. The
    same on every platform (threefry keys and a stable sort).

    Args:
        seed: Seed of the run.
        epoch: Which epoch; may be traced.
        n: Number of images, static.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SHUFFLE_STREAM), epoch)
    return jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))


def augment(
    key: Key[Array, ""], images: UInt8[Array, "b h w c"], *, crop_padding: int, flip: bool
) -> UInt8[Array, "b h w c"]:
    """Crop each image at random out of its zero-padded self, then mirror half of them.

    Every image draws its own two offsets in 0..2 * crop_padding and its own flip (the standard
    augmentation of He et al. 2015, arXiv:1512.03385, section 4.2).

    Args:
        key: Random key of this batch.
        images: Training images.
        crop_padding: Zero pixels on each side.
        flip: Whether to mirror left to right with probability one half.
    """
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        offsets = jax.random.randint(crop_key, (len(images), 2), 0, 2 * crop_padding + 1)
        images = _crop(images, offsets, crop_padding)
    if flip:
        flips = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(flips, images[:, :, ::-1], images)
    return images


def _crop(
    images: UInt8[Array, "b h w c"], offsets: Int32[Array, "b 2"], padding: int
) -> UInt8[Array, "b h w c"]:
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def normalize(
    images: UInt8[Array, "b h w c"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: Any = jnp.float32,
) -> Float[Array, "b h w c"]:
    """Per-channel (x / 255 - mean) / std, computed as (x - 255 mean) * (1 / (255 std)).

    Subtraction first leaves the compiler no multiplication and addition to contract into one
    rounding, so the result has the same bits on CPU, GPU and TPU.

    Args:
        images: Raw images.
        mean: Mean of each channel, in units of 0..1.
        std: Standard deviation of each channel, in units of 0..1.
        dtype: Of the result; the arithmetic is float32.
    """
    center = (255 * np.asarray(mean, np.float64)).astype(np.float32)
    scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
    return ((images.astype(jnp.float32) - center) * scale).astype(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches:
    """A split in batches of one size, in order, the last one filled up with masked zeros.

    Attributes:
        images: uint8[k, b, h, w, c].
        labels: int32[k, b]; 0 where masked.
        mask: bool[k, b]; False for the filling.
    """

    images: UInt8[np.ndarray, "k b h w c"]
    labels: Int32[np.ndarray, "k b"]
    mask: Bool[np.ndarray, "k b"]


def eval_batches(split: Split, batch_size: int) -> EvalBatches:
    """Cut a split into batches that hold every image exactly once.

    Args:
        split: Images to evaluate.
        batch_size: Images a batch; more than the split has gives one batch of that size.

    Raises:
        ValueError: If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size!r}.")
    count = -(-len(split) // batch_size)
    filling = count * batch_size - len(split)

    def cut(array: np.ndarray) -> np.ndarray:
        if filling:
            array = np.concatenate([array, np.zeros((filling, *array.shape[1:]), array.dtype)])
        return array.reshape(count, batch_size, *array.shape[1:])

    return EvalBatches(cut(split.images), cut(split.labels), cut(np.ones(len(split), bool)))
