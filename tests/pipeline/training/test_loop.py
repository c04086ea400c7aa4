"""The training loop: stops, resumes, records, and states that are not finite."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxqat.pipeline.training import (
    Data,
    DivergedError,
    Reporter,
    StagePlan,
    Stopped,
    StopRequest,
    init_state,
    make_step,
    run_stage,
    stop_on_signals,
)
from jaxqat.pipeline.training.loop import check_finite, make_dispatch

IMAGES, BATCH, CLASSES, EPOCHS = 23, 4, 3, 3
STEPS_PER_EPOCH = IMAGES // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH


def make_stage(
    *,
    learning_rate: float = 0.5,
    steps_per_dispatch: int = 1,
    validate=None,
    skip_failed=False,
    poisoned=(),
):
    """Logistic regression on noise: three epochs of five steps; the last epoch is frozen.

    The loss of a batch with a poisoned image is NaN.
    """
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (IMAGES, 2, 2, 1)), jnp.uint8)
    labels = jnp.asarray(rng.integers(0, CLASSES, IMAGES), jnp.int32)
    for image in poisoned:
        images = images.at[image].set(255)
    optimizer = optax.sgd(lambda count: learning_rate, momentum=0.9)  # It counts the steps.

    def forward(params, collections, x, key):
        mean = 0.9 * collections["mean"] + 0.1 * x.mean()
        return x.reshape(len(x), -1) @ params["w"] - mean, {"mean": mean}

    def frozen_forward(params, collections, x, key):
        return x.reshape(len(x), -1) @ params["w"] - collections["mean"], collections

    def prepare(key, images):
        bad = jnp.all(images == 255, axis=(1, 2, 3), keepdims=True)
        images = jnp.where(bad, jnp.nan, images / 255.0)
        return images + jax.random.uniform(key, images.shape)

    steps = [
        make_step(
            forward=f,
            prepare=prepare,
            optimizer=optimizer,
            batch_size=BATCH,
            steps_per_epoch=STEPS_PER_EPOCH,
            label_smoothing=0.0,
            skip_failed=skip_failed,
        )
        for f in (forward, frozen_forward)
    ]
    stage = StagePlan(
        name="fp32",
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        batch_size=BATCH,
        steps_per_dispatch=steps_per_dispatch,
        step=lambda epoch: (steps[epoch == EPOCHS], epoch == EPOCHS),
        order=lambda epoch: jax.random.permutation(jax.random.key(epoch), IMAGES),
        data=Data(images, labels),
        key=jax.random.key(5),
        learning_rate=lambda step: learning_rate / (step + 1),
        validate=validate,
        skip_failed=skip_failed,
    )
    params = {"w": jnp.zeros((4, CLASSES))}
    return stage, init_state(params, {"mean": jnp.float32(0)}, optimizer)


class Recorder(Reporter):
    """Records all reports, and requests a stop after a number of steps."""

    def __init__(self, stop: StopRequest | None = None, stop_after: int | None = None):
        self.stop, self.stop_after = stop or StopRequest(), stop_after
        self.steps, self.records, self.saved = 0, [], []
        self.compiled, self.left_out = [], {}

    def compiling(self, *, frozen):
        self.compiled.append(frozen)

    def advance(self, steps):
        self.steps += steps
        if self.stop_after is not None and self.steps >= self.stop_after:
            self.stop.signum = signal.SIGTERM

    def skipped(self, epoch, steps):
        self.left_out[epoch] = steps

    def last_saved(self):
        return max((int(state.step) for state, *_ in self.saved), default=None)

    def epoch(self, record):
        self.records.append(record)

    def save(self, state, record, *, epoch_seconds, epoch_skipped, stopping):
        self.epoch_skipped = epoch_skipped
        self.saved.append((state, record, epoch_seconds, stopping))


def run(stage, state, recorder, epoch_seconds=0.0, epoch_skipped=0):
    return run_stage(
        stage,
        state,
        reporter=recorder,
        stop=recorder.stop,
        epoch_seconds=epoch_seconds,
        epoch_skipped=epoch_skipped,
    )


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(
    ("stop_after", "steps_per_dispatch"),
    # Within, at the end and at the start of an epoch; in the frozen one; at the very end; between
    # dispatches of several steps.
    [(1, 1), (5, 1), (6, 1), (12, 1), (15, 1), (3, 2)],
)
def test_a_stage_stopped_anywhere_and_resumed_ends_with_the_same_bits(
    stop_after, steps_per_dispatch
):
    stage, state = make_stage(steps_per_dispatch=steps_per_dispatch)
    whole = Recorder()
    expected = run(stage, state, whole)

    stage, state = make_stage(steps_per_dispatch=steps_per_dispatch)
    first = Recorder(stop_after=stop_after)
    with pytest.raises(Stopped):
        run(stage, state, first)
    saved, record, seconds, stopping = first.saved[-1]
    assert stopping
    assert int(saved.step) >= stop_after
    assert (record is None) == (int(saved.step) % STEPS_PER_EPOCH != 0)

    second = Recorder()
    actual = run(stage, jax.tree.map(jnp.array, saved), second, seconds)
    assert_same_bits(actual, expected)
    # The sums of an interrupted epoch continue too: the records are equal except for times.
    lines = [
        [(r["epoch"], r["step"], r["loss"], r["accuracy"], r["frozen"]) for r in records]
        for records in (whole.records, first.records + second.records)
    ]
    assert lines[0] == lines[1]


def test_a_stop_within_an_epoch_saves_a_state_within_it():
    stage, state = make_stage()
    recorder = Recorder(stop_after=STEPS_PER_EPOCH + 1)
    with pytest.raises(Stopped):
        run(stage, state, recorder)
    saved, record, seconds, _ = recorder.saved[-1]
    assert STEPS_PER_EPOCH < int(saved.step) < 2 * STEPS_PER_EPOCH
    assert record is None
    assert seconds > 0


def test_records_hold_epoch_step_scores_and_learning_rate():
    stage, state = make_stage()
    recorder = Recorder()
    run(stage, state, recorder)
    assert [r["epoch"] for r in recorder.records] == [1, 2, 3]
    assert [r["step"] for r in recorder.records] == [5, 10, 15]
    assert [r["frozen"] for r in recorder.records] == [False, False, True]
    assert recorder.compiled == [False, True]
    # The schedule at the last update of each epoch, which is update number 5, 10 and 15.
    assert [r["learning_rate"] for r in recorder.records] == [0.5 / 5, 0.5 / 10, 0.5 / 15]
    for (state, _, _, _), record in zip(recorder.saved, recorder.records, strict=True):
        assert record["loss"] == float(state.loss_sum) / STEPS_PER_EPOCH
        assert record["accuracy"] == int(state.correct) / (STEPS_PER_EPOCH * BATCH)
        assert record["validation_loss"] is None
        assert record["gradient_norm"] > 0
        assert record["images_per_s"] * record["seconds"] == pytest.approx(STEPS_PER_EPOCH * BATCH)


def test_the_time_of_an_interrupted_epoch_is_continued():
    stage, state = make_stage()
    recorder = Recorder()
    run(stage, state._replace(step=jnp.int32(3)), recorder, epoch_seconds=1000.0)
    seconds = [r["seconds"] for r in recorder.records]
    assert 1000 < seconds[0] < 1100
    assert max(seconds[1:]) < 100


def test_only_the_frozen_epoch_leaves_the_collections_unchanged():
    stage, state = make_stage()
    recorder = Recorder()
    run(stage, state, recorder)
    means = [float(saved.collections["mean"]) for saved, *_ in recorder.saved]
    assert means[0] != means[1]
    assert means[1] == means[2]
    weights = [saved.params["w"] for saved, *_ in recorder.saved]
    assert (weights[1] != weights[2]).all()


def test_a_state_that_is_not_finite_is_an_error_and_not_saved():
    # Near the largest float32: the first update gives weights whose loss is infinite or NaN.
    stage, state = make_stage(learning_rate=3e38)
    recorder = Recorder()
    wanted = r"fp32: .* in step 2, in epoch 1, at learning rate 1.5e\+38 .*no checkpoint yet"
    with pytest.raises(DivergedError, match=rf"{wanted}.*fp32.optimizer.learning_rate"):
        run(stage, state, recorder)
    assert not recorder.saved
    assert not recorder.records


def place(image: int, epoch: int) -> int:
    """Return the number of the step that sees an image in an epoch, counted from 1; 0 if none."""
    at = int(np.flatnonzero(jax.random.permutation(jax.random.key(epoch), IMAGES) == image)[0])
    return 0 if at >= STEPS_PER_EPOCH * BATCH else (epoch - 1) * STEPS_PER_EPOCH + at // BATCH + 1


@pytest.mark.parametrize("steps_per_dispatch", [1, 2])
def test_a_loss_of_nan_names_its_step_and_the_last_good_one(steps_per_dispatch):
    image = next(i for i in range(IMAGES) if not place(i, 1) and place(i, 2))
    stage, state = make_stage(steps_per_dispatch=steps_per_dispatch, poisoned=[image])
    recorder = Recorder()
    step = place(image, 2)
    rate = f"{0.5 / step:.3g}"
    wanted = rf"NaN in step {step}, in epoch 2, at learning rate {rate} .*of step 5 is good"
    with pytest.raises(DivergedError, match=rf"(?s){wanted}.*fp32.skip_failed_steps"):
        run(stage, state, recorder)
    assert [int(saved.step) for saved, *_ in recorder.saved] == [5]


@pytest.mark.parametrize("steps_per_dispatch", [1, 2])
def test_a_step_that_is_skipped_changes_nothing_and_is_reported(steps_per_dispatch):
    image = next(i for i in range(IMAGES) if all(place(i, epoch) for epoch in (1, 2, 3)))
    bad = [place(image, epoch) for epoch in (1, 2, 3)]
    stage, state = make_stage(
        steps_per_dispatch=steps_per_dispatch, skip_failed=True, poisoned=[image]
    )
    recorder = Recorder()
    final = run(stage, state, recorder)
    assert recorder.left_out == {epoch: [step] for epoch, step in enumerate(bad, start=1)}
    assert int(final.step) == STEPS
    # The same steps one by one, without those that are bad.
    plain, state = make_stage(poisoned=[image])
    for number in range(STEPS):
        epoch = number // STEPS_PER_EPOCH + 1
        if number + 1 in bad:
            new_epoch = number % STEPS_PER_EPOCH == 0
            sums = {"loss_sum": jnp.float32(0), "correct": jnp.int32(0)} if new_epoch else {}
            counted = jax.tree.map(lambda x: x + (x.dtype == jnp.int32), state.opt_state)
            state = state._replace(step=state.step + 1, opt_state=counted, **sums)
        else:
            step = jax.jit(plain.step(epoch)[0])
            state, _ = step(state, plain.data, plain.order(epoch), plain.key)
    # Programs of several steps round otherwise: 15 steps, each with some roundings of numbers near
    # one.
    atol = 0 if steps_per_dispatch == 1 else 15 * 2**-20
    for a, b in zip(jax.tree.leaves(final), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_an_epoch_s_record_is_of_its_good_steps():
    image = next(i for i in range(IMAGES) if place(i, 1) == STEPS_PER_EPOCH)
    stage, state = make_stage(skip_failed=True, poisoned=[image])
    recorder = Recorder()
    run(stage, state, recorder)
    record, (saved, *_) = recorder.records[0], recorder.saved[0]
    assert recorder.left_out[1] == [STEPS_PER_EPOCH]
    assert record["loss"] == float(saved.loss_sum) / (STEPS_PER_EPOCH - 1) > 0
    assert record["accuracy"] == int(saved.correct) / ((STEPS_PER_EPOCH - 1) * BATCH)
    assert record["gradient_norm"] is None  # Of the last step.


def test_a_run_stopped_after_a_skipped_step_resumes_as_an_uninterrupted_one():
    image = next(i for i in range(IMAGES) if place(i, 1) == 1)
    stage, state = make_stage(skip_failed=True, poisoned=[image])
    whole, first, second = Recorder(), Recorder(stop_after=1), Recorder()
    expected = run(stage, state, whole)
    stage, state = make_stage(skip_failed=True, poisoned=[image])
    with pytest.raises(Stopped):
        run(stage, state, first)
    assert first.epoch_skipped == 1
    saved, _, seconds, _ = first.saved[-1]
    actual = run(stage, jax.tree.map(jnp.array, saved), second, seconds, first.epoch_skipped)
    assert_same_bits(actual, expected)
    assert [r["loss"] for r in second.records] == [r["loss"] for r in whole.records]


def test_an_epoch_without_a_good_step_is_an_error():
    stage, state = make_stage(skip_failed=True, poisoned=range(IMAGES))
    recorder = Recorder()
    with pytest.raises(DivergedError, match="NaN in every step, in epoch 1"):
        run(stage, state, recorder)
    assert recorder.left_out == {1: [1, 2, 3, 4, 5]}
    assert not recorder.saved


def test_a_network_that_diverged_counts_its_nan_by_collection():
    stage, state = make_stage()
    broken = state._replace(
        params={"w": state.params["w"].at[0, :2].set(jnp.nan)},
        collections={"quant": jnp.full(3, jnp.nan), "batch_stats": jnp.zeros(2)},
    )
    with pytest.raises(DivergedError, match="numbers that are NaN now: 2 in params, 3 in quant"):
        check_finite(stage, broken, 1, Recorder())


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_weights_and_statistics_must_be_finite_even_if_the_loss_is(bad):
    # As after the last update of an epoch, which has not influenced a loss yet.
    stage, state = make_stage()
    check_finite(stage, state, 1, Recorder())
    broken = {"params": {"w": state.params["w"].at[0, 0].set(bad)}}
    for changed in (broken, {"collections": {"mean": jnp.float32(bad)}}):
        with pytest.raises(DivergedError, match="weights or statistics became infinite or NaN"):
            check_finite(stage, state._replace(**changed), 1, Recorder())


def test_validation_sees_the_state_at_the_end_of_each_epoch():
    seen = []

    def validate(state):
        seen.append(int(state.step))
        return {"validation_loss": 0.5, "validation_accuracy": 0.25}

    stage, state = make_stage(validate=validate)
    recorder = Recorder()
    run(stage, state, recorder)
    assert seen == [5, 10, 15]
    assert {r["validation_accuracy"] for r in recorder.records} == {0.25}


def test_each_step_function_is_compiled_once_for_each_dispatch_length(monkeypatch):
    made = []

    def count(step, length):
        made.append((step, length))
        return make_dispatch(step, length)

    monkeypatch.setattr("jaxqat.pipeline.training.loop.make_dispatch", count)
    stage, state = make_stage(steps_per_dispatch=2)
    run(stage, state, Recorder())
    # Two step functions; dispatches of two steps and of the one left over from five.
    assert len(made) == len(set(made)) == 4
    assert {length for _, length in made} == {1, 2}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_a_request_and_a_second_one_acts_as_usual(signum):
    received = []
    previous = signal.signal(signum, lambda number, frame: received.append(number))
    try:
        with pytest.raises(Stopped) as caught, stop_on_signals() as stop:
            stop.listen()
            stop.raise_if_set()
            os.kill(os.getpid(), signum)
            assert stop.signum == signum
            assert received == []
            os.kill(os.getpid(), signum)
            assert received == [signum]
        assert caught.value.signum == signum  # At the end of the block.
    finally:
        signal.signal(signum, previous)


def test_until_a_request_listens_a_signal_acts_as_before_the_block():
    received = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        with pytest.raises(Stopped), stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert (received, stop.signum) == ([signal.SIGINT], None)
            stop.listen()
            os.kill(os.getpid(), signal.SIGINT)
            assert (received, stop.signum) == ([signal.SIGINT], signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_stage_listens_to_signals_once_its_first_steps_are_compiled():
    stage, state = make_stage()
    recorder, order = Recorder(), []
    recorder.compiling = lambda *, frozen: order.append("compiles")
    recorder.advance = lambda steps: order.append("trains")
    recorder.stop.listen = lambda: order.append("listens")
    run(stage, state, recorder)
    assert order[:3] == ["compiles", "listens", "trains"]


def test_the_block_restores_the_signal_handlers():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals() as stop:
        stop.listen()
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
