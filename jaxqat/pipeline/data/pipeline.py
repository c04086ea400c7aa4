"""Device-side input: the order of an epoch, augmentation, normalization, evaluation batches.

The training split stays on the device as uint8. A training step gathers its images by index and
calls these functions inside the same compiled program; the host handles no images in an epoch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8

from jaxqat.pipeline.data.arrays import Split

# Folded into the shuffle's key, so that other uses of the same seed have other random streams.
SHUFFLE_STREAM = 0x5F0F


def epoch_permutation(seed: int | Array, epoch: int | Array, n: int) -> Int32[Array, " n"]:
    """Return the order of the training images in an epoch.

    It depends on seed and epoch only, so a resumed run needs no saved shuffling state. It is the
    same on every platform (threefry keys and a stable sort).

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch; may be traced.
        n: Number of images, static.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SHUFFLE_STREAM), epoch)
    return jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))


def augment(
    key: Key[Array, ""], images: UInt8[Array, "b h w c"], *, crop_padding: int, flip: bool
) -> UInt8[Array, "b h w c"]:
    """Pad each image with zeros and crop it at random, then mirror half of the images.

    Each image has its own two offsets in 0..2 * crop_padding and its own flip (the standard
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
    """Return (x / 255 - mean) / std per channel, computed as (x - 255 mean) * (1 / (255 std)).

    With the subtraction first, a compiler cannot fuse a multiplication and an addition into one
    rounding, so the result has the same bits on CPU, GPU and TPU.

    Args:
        images: Raw images.
        mean: Mean of each channel, in units of 0..1.
        std: Standard deviation of each channel, in units of 0..1.
        dtype: Type of the result; the arithmetic is float32.
    """
    center = (255 * np.asarray(mean, np.float64)).astype(np.float32)
    scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
    return ((images.astype(jnp.float32) - center) * scale).astype(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches:
    """A split in batches of one size, in order; the last batch is padded with masked zeros.

    Attributes:
        images: uint8[k, b, h, w, c].
        labels: int32[k, b]; 0 for padding.
        mask: bool[k, b]; False for padding.
    """

    images: UInt8[np.ndarray, "k b h w c"]
    labels: Int32[np.ndarray, "k b"]
    mask: Bool[np.ndarray, "k b"]


def eval_batches(split: Split, batch_size: int) -> EvalBatches:
    """Cut a split into batches that hold every image exactly once.

    Args:
        split: Images to evaluate.
        batch_size: Images per batch; a smaller split gives one padded batch.

    Raises:
        ValueError: If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size!r}.")
    count = -(-len(split) // batch_size)
    padding = count * batch_size - len(split)

    def cut(array: np.ndarray) -> np.ndarray:
        if padding:
            array = np.concatenate([array, np.zeros((padding, *array.shape[1:]), array.dtype)])
        return array.reshape(count, batch_size, *array.shape[1:])

    return EvalBatches(cut(split.images), cut(split.labels), cut(np.ones(len(split), bool)))
