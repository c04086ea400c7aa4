"""The training step: its images, its keys and its sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxqat.pipeline.training import COMPILATIONS, Data, cross_entropy, init_state, make_step
from jaxqat.pipeline.training.step import dispatch_length, make_dispatch

IMAGES, BATCH, CLASSES = 10, 3, 4
STEPS_PER_EPOCH = IMAGES // BATCH


def make_recorder(steps: int):
    """Return a step whose 'model' records its images and keys in its collections."""

    def prepare(key, images):
        ids = images[:, 0, 0, 0].astype(jnp.uint32)
        return jnp.concatenate([ids, jax.random.key_data(key)])

    def forward(params, collections, prepared, _):
        ids, key = prepared[:BATCH], prepared[BATCH:]
        counts = collections["counts"].at[ids].add(1)
        keys = collections["keys"].at[collections["n"]].set(key)
        logits = jnp.zeros((BATCH, CLASSES)) + params["bias"]
        return logits, {"counts": counts, "keys": keys, "n": collections["n"] + 1}

    optimizer = optax.sgd(0.1)
    step = make_step(
        forward=forward,
        prepare=prepare,
        optimizer=optimizer,
        batch_size=BATCH,
        steps_per_epoch=STEPS_PER_EPOCH,
        label_smoothing=0.0,
    )
    collections = {
        "counts": jnp.zeros(IMAGES, jnp.int32),
        "keys": jnp.zeros((steps, 2), jnp.uint32),
        "n": jnp.int32(0),
    }
    state = init_state({"bias": jnp.zeros(CLASSES)}, collections, optimizer)
    images = jnp.arange(IMAGES, dtype=jnp.uint8)[:, None, None, None]
    labels = jnp.arange(IMAGES, dtype=jnp.int32) % CLASSES
    return step, state, Data(images, labels)


@pytest.mark.parametrize("length", [1, STEPS_PER_EPOCH], ids=["one_step", "scan"])
def test_an_epoch_takes_each_image_of_the_order_once_and_drops_the_partial_batch(length):
    step, state, data = make_recorder(STEPS_PER_EPOCH)
    order = jnp.asarray(np.random.default_rng(0).permutation(IMAGES), jnp.int32)
    dispatch = make_dispatch(step, length)
    for _ in range(STEPS_PER_EPOCH // length):
        state, _ = dispatch(state, data, order, jax.random.key(0))
    expected = np.zeros(IMAGES, np.int32)
    expected[np.asarray(order[: STEPS_PER_EPOCH * BATCH])] = 1
    np.testing.assert_array_equal(state.collections["counts"], expected)
    assert expected.sum() == IMAGES - 1


def test_the_key_of_a_step_is_the_stages_key_folded_with_its_number():
    steps = 2 * STEPS_PER_EPOCH
    step, state, data = make_recorder(steps)
    key = jax.random.key(7)
    for _ in range(steps):
        state, _ = jax.jit(step)(state, data, jnp.arange(IMAGES), key)
    expected = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(steps)]
    np.testing.assert_array_equal(state.collections["keys"], np.stack(expected))


def test_the_sums_are_those_of_the_current_epoch_only():
    step, state, data = make_recorder(2 * STEPS_PER_EPOCH)
    losses = []
    for _ in range(STEPS_PER_EPOCH + 1):
        state, report = jax.jit(step)(state, data, jnp.arange(IMAGES), jax.random.key(0))
        losses.append(float(report.loss))
    assert float(state.loss_sum) == losses[-1]
    assert int(state.correct) <= BATCH
    assert int(state.step) == STEPS_PER_EPOCH + 1


def test_correct_counts_correct_predictions():
    step, state, data = make_recorder(1)
    state = state._replace(params={"bias": jnp.asarray([0.0, 1.0, 0.0, 0.0])})
    # Images 0, 1, 2 have labels 0, 1, 2; the model always says 1.
    state, _ = jax.jit(step)(state, data, jnp.arange(IMAGES), jax.random.key(0))
    assert int(state.correct) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_its_definition(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, 5).astype(np.int32)
    target = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
    p = np.exp(logits.astype(np.float64))
    expected = -(target * np.log(p / p.sum(1, keepdims=True))).sum(1).mean()
    # A dozen float32 roundings on numbers below 4.
    actual = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=12 * 4 * 2**-24)


def test_a_dispatch_takes_over_the_state_and_leaves_the_loss():
    step, state, data = make_recorder(2)
    dispatch = make_dispatch(step, 1)
    before = state.collections["counts"]
    state, report = dispatch(state, data, jnp.arange(IMAGES), jax.random.key(0))
    assert before.is_deleted()
    dispatch(state, data, jnp.arange(IMAGES), jax.random.key(0))
    assert float(report.loss) > 0  # Still readable after its state was given away.


def convolutional_step():
    """Return the step of a small convolutional network, its state and its arguments."""
    rng = np.random.default_rng(0)
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 1, 8)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(8, CLASSES)), jnp.float32),
    }

    def forward(params, collections, images, _):
        x = jax.lax.conv_general_dilated(
            images, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jax.nn.relu(x), axis=(1, 2)) @ params["head"], collections

    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_step(
        forward=forward,
        prepare=lambda key, images: images / 255.0,
        optimizer=optimizer,
        batch_size=BATCH,
        steps_per_epoch=STEPS_PER_EPOCH,
        label_smoothing=0.0,
    )
    images = jnp.asarray(rng.integers(0, 256, (IMAGES, 8, 8, 1)), jnp.uint8)
    data = Data(images, jnp.arange(IMAGES, dtype=jnp.int32) % CLASSES)
    state = init_state(params, {}, optimizer)
    return forward, step, state, (data, jnp.arange(IMAGES), jax.random.key(0))


@pytest.mark.parametrize("compilation", COMPILATIONS)
@pytest.mark.parametrize("length", [1, STEPS_PER_EPOCH], ids=["one_step", "scan"])
def test_the_gradient_norm_changes_no_bit_of_the_training(length, compilation, monkeypatch):
    states = []
    for without in (False, True):
        _, step, state, arguments = convolutional_step()
        with monkeypatch.context() as patch:
            if without:
                patch.setattr(optax.tree, "norm", lambda tree: jnp.float32(0))
            dispatch = make_dispatch(step, length)
            compiled = COMPILATIONS[compilation].compile(dispatch, state, *arguments)
        for _ in range(STEPS_PER_EPOCH // length):
            state, report = compiled(state, *arguments)
        assert (float(report.gradient_norm) == 0) is without
        states.append(state)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_the_gradient_norm_is_that_of_the_whole_gradient():
    forward, step, state, (data, order, key) = convolutional_step()
    _, report = jax.jit(step)(state, data, order, key)
    images, labels = data.images[:BATCH] / 255.0, data.labels[:BATCH]
    grads = jax.grad(lambda p: cross_entropy(forward(p, {}, images, key)[0], labels, 0.0))
    squares = [np.square(np.asarray(g, np.float64)).sum() for g in grads(state.params).values()]
    # A float32 sum of 104 squares, of gradients with a few roundings each.
    np.testing.assert_allclose(report.gradient_norm, np.sqrt(sum(squares)), rtol=2**-16)


@pytest.mark.parametrize(
    ("steps", "limit", "expected"),
    [(390, 50, 39), (391, 50, 50), (7, 50, 7), (100, 50, 50), (5, 1, 1), (97, 10, 10)],
)
def test_dispatches_divide_the_epoch_where_a_divisor_is_near(steps, limit, expected):
    assert dispatch_length(steps, limit) == expected
