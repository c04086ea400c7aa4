"""The training step: a pure function of the state, the training split on the device and a key.

A step gathers its images, augments and normalizes them, and updates the parameters by the gradient
of the cross-entropy. Several steps form one dispatch (`lax.scan`), so that the device need not wait
for the host. A step's number determines its images, from the epoch's order, and its random key, by
folding the number into the stage's key.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Int32, Key, UInt8

Collections = dict[str, Any]
"""Variables other than the parameters, by collection: 'batch_stats', and 'quant' for QAT."""

Forward = Callable[[Any, Collections, Array, Array], tuple[Array, Collections]]
"""(params, collections, images, key) -> (logits, updated collections)."""

Prepare = Callable[[Array, Array], Array]
"""(key, uint8 images) -> augmented, normalized float images."""


class TrainState(NamedTuple):
    """All that changes in a stage; with config and data it determines the rest of the run."""

    step: Int32[Array, ""]
    """Updates done in this stage."""
    params: Any
    collections: Collections
    opt_state: optax.OptState
    loss_sum: Float[Array, ""]
    """Sum of the batch losses of the current epoch so far."""
    correct: Int32[Array, ""]
    """Correct predictions in the current epoch so far, on augmented images."""


class Data(NamedTuple):
    """The training split on the device."""

    images: UInt8[Array, "n h w c"]
    labels: Int[Array, " n"]


class StepReport(NamedTuple):
    """What a training step tells beside the new state; it has buffers of its own."""

    loss: Float[Array, ""]
    """Loss of the batch."""
    gradient_norm: Float[Array, ""]
    """Euclidean norm of the gradient, over all trained arrays."""
    failed: Int32[Array, "..."]
    """Number of the step, counted from 1, if its loss or gradient is infinite or NaN; otherwise 0.
    Of a dispatch, those of all its steps."""


QUANT_PARAMS = "quant_params"
"""The collection of learned step sizes, which are trained like parameters."""


def split_trained(params: Any, collections: Collections) -> tuple[dict[str, Any], Collections]:
    """Return the trained collections, `params` and `quant_params`, and the others."""
    rest = dict(collections)
    learned = {QUANT_PARAMS: rest.pop(QUANT_PARAMS)} if QUANT_PARAMS in rest else {}
    return {"params": params, **learned}, rest


def init_state(
    params: Any,
    collections: Collections,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Return the state before the first training step."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        collections=collections,
        opt_state=optimizer.init(split_trained(params, collections)[0]),
        loss_sum=jnp.float32(0),
        correct=jnp.int32(0),
    )


def cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], label_smoothing: float
) -> Float[Array, ""]:
    """Return the mean cross-entropy against (1 - a) one_hot(label) + a / k, in float32.

    a is the label smoothing (Szegedy et al. 2015, arXiv:1512.00567, section 7).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return -jnp.mean((1 - label_smoothing) * picked + label_smoothing * log_p.mean(axis=1))


def make_step(
    *,
    forward: Forward,
    prepare: Prepare,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    steps_per_epoch: int,
    label_smoothing: float,
    skip_failed: bool = False,
) -> Callable[[TrainState, Data, Array, Array], tuple[TrainState, StepReport]]:
    """Return a training step (state, data, order, key) -> (state, report).

    Args:
        forward: The model in training mode.
        prepare: Augmentation and normalization.
        optimizer: The update rule.
        batch_size: Images per training step.
        steps_per_epoch: Whole batches in an epoch; order[steps_per_epoch * batch_size:] is unused.
        label_smoothing: See `cross_entropy`.
        skip_failed: Whether a step has no effect if its loss, its gradient or a number of the new
            state is infinite or NaN; the learning rate goes on.
    """

    def step(
        state: TrainState, data: Data, order: Int32[Array, " n"], key: Key[Array, ""]
    ) -> tuple[TrainState, StepReport]:
        position = state.step % steps_per_epoch
        indices = jax.lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
        labels = data.labels[indices]
        key = jax.random.fold_in(key, state.step)
        images = prepare(key, data.images[indices])

        trained, rest = split_trained(state.params, state.collections)

        def loss_of(trained):
            others = {name: value for name, value in trained.items() if name != "params"}
            # For dropout. Augmentation splits the key in two, which are the numbers 0 and 1.
            logits, collections = forward(
                trained["params"], {**rest, **others}, images, jax.random.fold_in(key, 2)
            )
            return cross_entropy(logits, labels, label_smoothing), (logits, collections)

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (logits, collections)), grads = gradient(trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        new: Any = optax.apply_updates(trained, updates)
        params = new.pop("params")
        collections = {**collections, **new}
        is_first = position == 0
        loss_sum = jnp.where(is_first, 0.0, state.loss_sum)
        correct_sum = jnp.where(is_first, 0, state.correct)
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            collections=collections,
            opt_state=opt_state,
            loss_sum=loss_sum + loss,
            correct=correct_sum + correct,
        )
        # Behind the barrier, the norm is computed of the finished gradient: it cannot change how
        # the update is compiled, and so its last bits.
        norm = optax.tree.norm(jax.lax.optimization_barrier(grads))
        finite = jnp.isfinite(jax.lax.optimization_barrier(loss)) & jnp.isfinite(norm)
        if skip_failed:
            finite &= jnp.all(
                jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(new_state)])
            )
            # The optimizer counts the step: the schedule of the learning rate goes on.
            old = state._replace(
                step=state.step + 1,
                opt_state=jax.tree.map(_old_unless_count, opt_state, state.opt_state),
                loss_sum=loss_sum,
                correct=correct_sum,
            )
            new_state = jax.tree.map(partial(jnp.where, finite), new_state, old)
        return new_state, StepReport(loss, norm, jnp.where(finite, 0, state.step + 1))

    return step


def _old_unless_count(new: Array, old: Array) -> Array:
    return new if jnp.issubdtype(old.dtype, jnp.integer) else old


def make_dispatch(step: Callable, length: int) -> Callable:
    """Return `length` training steps as one jitted call; the state's buffers are donated.

    One step gets no loop: XLA's CPU backend has threaded convolutions only outside of loops.

    Returns:
        (state, data, order, key) -> (state, report of the last step, with `failed` of all). The
        report has its own buffers: it stays readable after the state was donated to the next call.
    """
    if length == 1:
        return jax.jit(step, donate_argnums=0)

    def dispatch(state, data, order, key):
        state, reports = jax.lax.scan(
            lambda carry, _: step(carry, data, order, key), state, length=length
        )
        last = jax.tree.map(lambda values: values[-1], reports)
        return state, last._replace(failed=reports.failed)

    return jax.jit(dispatch, donate_argnums=0)


def dispatch_length(steps_per_epoch: int, limit: int) -> int:
    """Return the steps per dispatch: at most `limit`, and a divisor of the epoch if possible.

    A divisor saves compiling another dispatch for the rest of an epoch. Divisors of half the limit
    or less are not used.
    """
    for length in range(min(limit, steps_per_epoch), limit // 2, -1):
        if steps_per_epoch % length == 0:
            return length
    return min(limit, steps_per_epoch)
