"""The device-side input against NumPy loops that share no code with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxqat.pipeline.data import (
    AugmentConfig,
    DataConfig,
    Split,
    augment,
    epoch_permutation,
    eval_batches,
    normalize,
)


def random_images(shape, seed=0):
    # From 1 on, so that a zero in a crop can only be padding.
    return np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 2, 1000, 4099])
def test_an_epoch_visits_every_image_once(n):
    order = epoch_permutation(0, 3, n)

    assert order.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_the_order_depends_only_on_seed_and_epoch():
    orders = {
        (seed, epoch): tuple(np.asarray(epoch_permutation(seed, epoch, 500)).tolist())
        for seed in (0, 1, 7)
        for epoch in (0, 1, 2)
    }

    assert len(set(orders.values())) == 9
    assert tuple(np.asarray(epoch_permutation(7, 2, 500)).tolist()) == orders[7, 2]


def test_the_order_is_the_same_with_a_traced_seed_and_epoch():
    jitted = jax.jit(lambda seed, epoch: epoch_permutation(seed, epoch, 100))

    np.testing.assert_array_equal(jitted(5, 2), epoch_permutation(5, 2, 100))


def test_every_image_appears_at_every_position_equally_often():
    orders = np.stack([epoch_permutation(0, epoch, 4) for epoch in range(4000)])

    counts = np.stack([np.bincount(orders[:, place], minlength=4) for place in range(4)])
    # Binomial(4000, 1/4): standard deviation sqrt(4000 * 3 / 16) = 27.4; five of them is 137,
    # which 16 counts exceed by chance with probability 1e-5. The seed is fixed.
    assert np.abs(counts - 1000).max() <= 137


def reference_augment(image, top, left, flipped, padding):
    """Crop pixel by pixel: out[i, j] is the pixel at (top + i - p, left + j - p), or 0."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            row, column = top + i - padding, left + j - padding
            if 0 <= row < height and 0 <= column < width:
                out[i, width - 1 - j if flipped else j] = image[row, column]
    return out


def find_draw(image, result, padding, flips):
    """Return the draws (top, left, flipped) that give `result`."""
    return [
        (top, left, flipped)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        for flipped in flips
        if np.array_equal(reference_augment(image, top, left, flipped, padding), result)
    ]


@pytest.mark.parametrize("flip", [False, True], ids=["no_flip", "flip"])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("shape", [(40, 6, 5, 3), (40, 4, 4, 1)], ids=["rgb", "grey"])
def test_each_augmented_image_is_exactly_one_padded_crop_and_flip(shape, padding, flip):
    images = random_images(shape)

    results = np.asarray(
        augment(jax.random.key(0), jnp.asarray(images), crop_padding=padding, flip=flip)
    )

    assert results.dtype == np.uint8
    draws = set()
    for image, result in zip(images, results, strict=True):
        found = find_draw(image, result, padding, (False, True) if flip else (False,))
        assert len(found) == 1
        draws.update(found)
    # 40 images draw independently: with one draw for the whole batch there would be one.
    assert len(draws) > 1 or not (padding or flip)


def test_all_offsets_and_flips_are_drawn_equally_often():
    image = random_images((1, 5, 5, 1))
    images = jnp.asarray(np.repeat(image, 9000, axis=0))

    results = np.asarray(augment(jax.random.key(1), images, crop_padding=1, flip=True))

    outcomes, counts = np.unique(results.reshape(9000, -1), axis=0, return_counts=True)
    assert len(outcomes) == 9 * 2
    # Binomial(9000, 1/18): mean 500, standard deviation 21.7; five of them is 109.
    assert np.abs(counts - 500).max() <= 109
    for outcome in outcomes:
        assert find_draw(image[0], outcome.reshape(5, 5, 1), 1, (False, True))


def test_the_crop_does_not_depend_on_whether_images_are_flipped():
    images = jnp.asarray(random_images((30, 6, 6, 3)))
    key = jax.random.key(2)

    cropped = augment(key, images, crop_padding=2, flip=False)
    both = augment(key, images, crop_padding=2, flip=True)

    same = np.all(both == cropped, axis=(1, 2, 3))
    mirrored = np.all(both == cropped[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert 0 < same.sum() < 30


def test_augmentation_is_a_function_of_its_key_and_can_be_jitted():
    images = jnp.asarray(random_images((20, 6, 6, 3)))
    jitted = jax.jit(lambda key, x: augment(key, x, crop_padding=2, flip=True))

    first = jitted(jax.random.key(0), images)

    np.testing.assert_array_equal(
        first, augment(jax.random.key(0), images, crop_padding=2, flip=True)
    )
    assert not np.array_equal(first, jitted(jax.random.key(1), images))


def test_no_padding_and_no_flip_leave_the_images_unchanged():
    images = random_images((8, 6, 6, 3))

    result = augment(jax.random.key(0), jnp.asarray(images), crop_padding=0, flip=False)

    np.testing.assert_array_equal(result, images)


def test_normalized_values_equal_the_definition_up_to_float32_rounding():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    result = np.asarray(normalize(jnp.asarray(images), mean, std))

    exact = (images / 255 - np.array(mean)) / np.array(std)
    # With u = 2**-24 and all in units of 1/(255 std): 255 mean is rounded once (255 mean u), the
    # difference once (|x - 255 mean| u), then the scale and the product once each, relative.
    step = 1 / (255 * np.array(std))
    bound = 2**-24 * (255 * np.array(mean) * step + 3 * np.abs(exact)) * (1 + 1e-6)
    assert result.dtype == np.float32
    assert np.all(np.abs(result - exact) <= bound)


def test_normalization_gives_the_same_bits_jitted_and_not():
    images = jnp.asarray(random_images((16, 8, 8, 3)))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    jitted = jax.jit(lambda x: normalize(x, mean, std))(images)

    np.testing.assert_array_equal(jitted, normalize(images, mean, std))


def test_normalization_to_bfloat16_rounds_the_float32_result_once():
    images = jnp.asarray(random_images((4, 8, 8, 3)))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    result = normalize(images, mean, std, dtype=jnp.bfloat16)

    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, normalize(images, mean, std).astype(jnp.bfloat16))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 5), (10, 4), (10, 1), (3, 8), (1, 1), (7, 7)])
def test_evaluation_batches_hold_every_image_once_and_in_order(n, batch_size):
    images, labels = random_images((n, 4, 4, 3)), np.arange(n, dtype=np.int32) % 3

    batches = eval_batches(Split(images, labels), batch_size)

    count = -(-n // batch_size)
    assert batches.images.shape == (count, batch_size, 4, 4, 3)
    assert batches.labels.shape == batches.mask.shape == (count, batch_size)
    assert batches.mask.dtype == bool
    assert (batches.images.dtype, batches.labels.dtype) == (np.uint8, np.int32)
    assert batches.mask.sum() == n
    np.testing.assert_array_equal(batches.images[batches.mask], images)
    np.testing.assert_array_equal(batches.labels[batches.mask], labels)
    assert not batches.images[~batches.mask].any()


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_an_error(batch_size):
    split = Split(random_images((3, 4, 4, 3)), np.zeros(3, np.int32))

    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        eval_batches(split, batch_size)


@pytest.mark.parametrize(
    ("name", "side", "padding", "flip"),
    [
        ("cifar10", 32, 4, True),
        ("folder", 64, 8, True),
        ("fashion_mnist", 28, 4, True),
        ("mnist", 28, 4, False),
        ("svhn_cropped", 32, 4, False),
        ("digits", 8, 1, False),
    ],
)
def test_augmentation_is_chosen_for_the_data_where_the_config_leaves_it_open(
    name, side, padding, flip
):
    data = DataConfig(name=name, data_dir="photos")
    chosen = AugmentConfig(crop_padding=padding, flip=flip)
    assert AugmentConfig().of(data, side, side + 1) == chosen
    given = AugmentConfig(crop_padding=0, flip=not flip)
    assert given.of(data, side, side) == given


def test_a_negative_padding_is_named_by_its_dotted_key():
    with pytest.raises(ValueError, match=r"augment.crop_padding must be in 0..4096, got -1"):
        AugmentConfig(crop_padding=-1)
