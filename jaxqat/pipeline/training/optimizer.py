"""Stochastic gradient descent with momentum, coupled weight decay and a cosine schedule.

The update is that of PyTorch's SGD, for which the published CIFAR recipes are written:

    g = gradient + weight_decay * p,    m = momentum * m + g,    p = p - learning_rate * m

or, with Nesterov momentum, p = p - learning_rate * (g + momentum * m). The decay is coupled: it is
added to the gradient before the momentum, so the learning rate scales it too.
"""

from functools import partial
from typing import Any

import jax
import optax

from jaxqat.pipeline.settings.training import OptimizerConfig


def make_schedule(
    config: OptimizerConfig, *, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates already done.

    lr(t) = peak * t / w                                     for t < w, the warm-up's steps
    lr(t) = peak * (1 + cos(pi * (t - w) / (T - w))) / 2     after the warm-up (cosine)

    Raises:
        ValueError: If the warm-up is not shorter than the training.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup and warmup >= total_steps:
        raise ValueError(
            f"optimizer.warmup_epochs must be shorter than the training, got "
            f"{config.warmup_epochs!r} ({warmup} of {total_steps} steps)."
        )
    peak = config.learning_rate
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1))
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def decays(trained: Any, *, norm_and_bias: bool = False) -> Any:
    """Return which trained arrays have weight decay.

    Args:
        trained: Trained arrays by collection. Those of `quant_params`, the learned step sizes,
            never decay; others do if they have more than one axis.
        norm_and_bias: Whether vectors and scalars decay too.
    """

    def decay(path: Any, array: Any) -> bool:
        learned = bool(path) and getattr(path[0], "key", None) == "quant_params"
        return not learned and (norm_and_bias or array.ndim > 1)

    return jax.tree_util.tree_map_with_path(decay, trained)


def make_optimizer(
    config: OptimizerConfig, *, total_steps: int, steps_per_epoch: int
) -> optax.GradientTransformation:
    """Return the update rule of the module's docstring.

    Args:
        config: Learning rate, momentum and decay.
        total_steps: Updates in the whole stage, where the cosine reaches 0.
        steps_per_epoch: Updates in an epoch, the unit of the warm-up.
    """
    schedule = make_schedule(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    mask = partial(decays, norm_and_bias=config.decay_norm_and_bias)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.sgd(schedule, momentum=config.momentum or None, nesterov=config.nesterov),
    )
