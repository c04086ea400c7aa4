"""The update rule against PyTorch's, written out in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxqat.pipeline.training import OptimizerConfig, make_optimizer, make_schedule

STEPS, STEPS_PER_EPOCH = 12, 4


def rate_at(config: OptimizerConfig, step: int) -> float:
    warmup = round(config.warmup_epochs * STEPS_PER_EPOCH)
    if step < warmup:
        return config.learning_rate * step / warmup
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - warmup) / (STEPS - warmup)
    return config.learning_rate * (1 + np.cos(np.pi * share)) / 2


def sgd(config: OptimizerConfig, params, gradients, decayed):
    """torch.optim.SGD, written after its documentation, in float64."""
    params = {k: v.astype(np.float64) for k, v in params.items()}
    velocity = {k: np.zeros_like(v) for k, v in params.items()}
    for step, gradient in enumerate(gradients):
        for k in params:
            g = gradient[k] + (config.weight_decay * params[k] if k in decayed else 0)
            velocity[k] = config.momentum * velocity[k] + g
            update = g + config.momentum * velocity[k] if config.nesterov else velocity[k]
            params[k] = params[k] - rate_at(config, step) * update
    return params


@pytest.mark.parametrize(
    ("config", "decayed"),
    [
        (OptimizerConfig(weight_decay=0.1), ("kernel", "bias")),
        (OptimizerConfig(weight_decay=0.1, nesterov=True), ("kernel", "bias")),
        (OptimizerConfig(weight_decay=0.1, decay_norm_and_bias=False), ("kernel",)),
        (OptimizerConfig(weight_decay=0.1, warmup_epochs=1, momentum=0), ("kernel", "bias")),
        (OptimizerConfig(weight_decay=0.1, schedule="constant"), ("kernel", "bias")),
    ],
    ids=["momentum", "nesterov", "spare_bias", "warmup_without_momentum", "constant"],
)
def test_updates_are_those_of_pytorchs_sgd(config, decayed):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    gradients = [
        {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in range(STEPS)
    ]
    expected = sgd(config, params, gradients, decayed)

    optimizer = make_optimizer(config, total_steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH)
    actual = {k: jnp.asarray(v) for k, v in params.items()}
    state = optimizer.init(actual)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, actual)
        actual = jax.tree.map(jnp.add, actual, updates)

    # Twelve steps of about five float32 roundings each (2**-24 relative), on numbers that stay
    # below 8: a tenth of this is typical.
    for k in shapes:
        np.testing.assert_allclose(actual[k], expected[k], rtol=0, atol=12 * 5 * 8 * 2**-24)
    # The parameters did change, by more than the tolerance.
    assert np.abs(expected["bias"] - params["bias"]).min() > 1e-3


def test_cosine_ends_at_zero_and_warm_up_starts_there():
    config = OptimizerConfig(learning_rate=0.5, warmup_epochs=1)
    schedule = make_schedule(config, total_steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH)
    rates = np.asarray([schedule(step) for step in range(STEPS + 1)])
    assert rates[0] == 0
    assert rates[STEPS_PER_EPOCH] == 0.5
    # cos(pi) in float32 is -1 except for the squared rounding of its argument.
    assert abs(rates[STEPS]) < 1e-7
    assert (np.diff(rates[STEPS_PER_EPOCH:]) < 0).all()


def test_a_warm_up_as_long_as_the_training_is_an_error():
    with pytest.raises(ValueError, match=r"warmup_epochs .* got 3 \(12 of 12 steps\)"):
        make_schedule(
            OptimizerConfig(warmup_epochs=3), total_steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be > 0, got nan"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs momentum > 0"),
        ({"weight_decay": -1e-4}, "weight_decay must be >= 0, got -0.0001"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, got 'linear'"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)


def test_state_has_the_shapes_of_the_parameters_and_a_count():
    params = {"kernel": jnp.ones((3, 4))}
    optimizer = make_optimizer(OptimizerConfig(), total_steps=2, steps_per_epoch=1)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(optimizer.init(params)))
    assert shapes == [(), (3, 4)]
