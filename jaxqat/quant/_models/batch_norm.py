# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`jaxqat.reestimate_batch_norm`: batch norm's running statistics, from a few batches.

Running statistics follow the network late: they are averages over the last training steps, in which
the weights still moved. Inference, and calibration with it, then sees other activations than
training did.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList, unfreeze

from jaxqat.errors import QuantizationError
from jaxqat.quant._models.batches import as_arguments, each_batch, preparing
from jaxqat.quant._models.bound import BoundModel
from jaxqat.quant._models.linen import QuantizedModule
from jaxqat.quant._trace.arguments import key_of, split_arrays

# (other arrays of the model, statistics before a batch, inputs) -> statistics after it.
Update = Callable[[Any, Any, tuple[Any, ...]], Any]

# A layer's statistics are called unconverged if so many of its channels are off by more than a
# tenth of a standard deviation of their values, and by more than three standard deviations of
# single batches' statistics, which a running average over several batches is not by chance.
SHARE_OF_CHANNELS, OF_VALUES, OF_BATCHES = 0.1, 0.1, 3.0


class BatchNormWarning(UserWarning):
    """Running statistics of batch norm are not those of the network's activations."""


class BatchNormEstimate(NamedTuple):
    """Statistics of batch norm over some batches.

    Attributes:
        statistics: The averages, in place of the running statistics.
        unconverged: For each layer whose running statistics were off, its path and the channels
            that were, as 'stage1/bn1 (5 of 16 channels)'.
    """

    statistics: Any
    unconverged: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """What to say about the running statistics; None if they had converged."""
        if not self.unconverged:
            return None
        return (
            "The running statistics of batch norm are not those of the batches: they have not "
            f"converged in {', '.join(self.unconverged)}. In inference the network sees other "
            "activations than in training, and ranges calibrated on them are wrong."
        )


def reestimate_batch_norm(
    model: Any,
    *state: Any,
    batches: Iterable[Any],
    preprocess: Callable[..., Any] | None = None,
    collection: str = "batch_stats",
    **kwargs: Any,
) -> Any:
    """Return a model's variables with batch norm's running statistics estimated anew.

    The new statistics are the means over the batches of each batch's mean and variance, which the
    network computes in training mode with its present weights (batch-norm re-estimation, as in
    AIMET; Krishnamoorthi 2018, arXiv:1806.08342, section 3):

        variables = jaxqat.reestimate_batch_norm(module, variables, batches=batches, train=True)

    Do it before calibration, so that the ranges are those of the activations of training, or after
    quantization-aware training, with the quantized model. Ranges do not move.

    A layer that uses its running statistics in this mode keeps them. The layers' momentum need not
    be known: it is measured on the first batch.

    Args:
        model: A Linen or NNX module; or what `jaxqat.quantize` made of one, or `jaxqat.calibrate`
            of a Linen module.
        *state: The variables of a Linen module. Nothing for other models, which hold them.
        batches: Inputs of the model, one batch each; a tuple holds several arguments. Use the
            training images with their augmentation.
        preprocess: Makes the model's input from a batch; None if the batches are the input.
        collection: Linen's collection of the statistics.
        **kwargs: Keyword arguments of the model's call that select training, such as `train=True`
            for Linen. NNX modules are in training mode (`module.train()`) during the call.

    Returns:
        For Linen, the variables with the new statistics. For a bound model, the bound model with
        them. An NNX module is changed in place, and returned.

    Raises:
        QuantizationError: There is no batch, `batches` is one array, the model has no running
            statistics, no layer changes them in this mode, or a batch gives none: it has NaN, or
            one value for each channel.

    Warns:
        BatchNormWarning: The running statistics had not converged; names the layers.
    """
    if isinstance(model, BoundModel):
        bound = model
        if not isinstance(bound.model, QuantizedModule):
            raise QuantizationError(
                "Of a bound model, statistics can be estimated anew if it was made of a Linen "
                "module; for an NNX module, pass the quantized module itself."
            )
        found = estimate_batch_norm(
            bound.model, bound.variables, batches=batches, preprocess=preprocess,
            collection=collection, **{**bound.kwargs, **kwargs},
        )  # fmt: skip
        result: Any = bound.with_variables(**{collection: found.statistics})
    elif isinstance(model, (nn.Module, QuantizedModule)):
        (variables,) = state
        found = estimate_batch_norm(
            model, variables, batches=batches, preprocess=preprocess,
            collection=collection, **kwargs,
        )  # fmt: skip
        result = {**variables, collection: found.statistics}
    else:
        from flax import nnx

        found = estimate_batch_norm(model, batches=batches, preprocess=preprocess, **kwargs)
        nnx.update(model, found.statistics)
        result = model
    if found.warning:
        warnings.warn(f"{found.warning} They are estimated anew.", BatchNormWarning, stacklevel=2)
    return result


def estimate_batch_norm(
    model: Any,
    *state: Any,
    batches: Iterable[Any],
    preprocess: Callable[..., Any] | None = None,
    collection: str = "batch_stats",
    **kwargs: Any,
) -> BatchNormEstimate:
    """Return batch norm's statistics over some batches; arguments of `reestimate_batch_norm`."""
    prepare = preparing(preprocess)
    if isinstance(model, (nn.Module, QuantizedModule)):
        (variables,) = state
        update, arrays, statistics = _of_linen(model, variables, collection, kwargs)
    else:
        update, arrays, statistics = _of_nnx(model, kwargs)
    leaves, structure = jax.tree_util.tree_flatten_with_path(statistics)
    # NNX's variables hold their arrays as 'value'.
    paths = ["/".join(name for name in key_of(path) if name != "value") for path, _ in leaves]

    @jax.jit
    def compiled(arrays: Any, values: list[Any], inputs: tuple[Any, ...]) -> list[Any]:
        given = jax.tree.unflatten(structure, values)
        return jax.tree.leaves(update(arrays, given, prepare(inputs)))

    flat_update = functools.partial(compiled, arrays)

    old = [leaf for _, leaf in leaves]
    if not old:
        raise QuantizationError(
            f"{type(model).__name__} has no running statistics of batch norm to estimate (for "
            f"Linen, the collection {collection!r})."
        )
    momentum: list[Any] = []
    seen: list[list[Any]] = []
    for number, batch in enumerate(each_batch(batches), 1):
        inputs = as_arguments(batch)
        if not momentum:
            momentum = _momentum(flat_update, old, inputs, paths)
        found = _of_batch(flat_update, old, momentum, inputs)
        _check_batch(number, paths, momentum, found)
        seen.append(found)
    if not seen:
        raise QuantizationError(
            "There is no batch to estimate statistics with: `batches` is empty; pass a few "
            "batches of inputs."
        )
    new = [
        before if m is None else np.mean(values, axis=0, dtype=np.float64).astype(before.dtype)
        for before, m, values in zip(old, momentum, zip(*seen, strict=True), strict=True)
    ]
    statistics = jax.tree.unflatten(structure, [jnp.asarray(value) for value in new])
    return BatchNormEstimate(statistics, _unconverged(paths, old, new, seen))


def _of_linen(
    model: Any, variables: Any, collection: str, kwargs: dict[str, Any]
) -> tuple[Update, Any, Any]:
    rest = {name: value for name, value in variables.items() if name != collection}
    arrays, rebuild = split_arrays(rest)

    def update(arrays: Any, statistics: Any, inputs: tuple[Any, ...]) -> Any:
        given = {**rebuild(arrays), collection: statistics}
        frozen = DenyList(tuple(name for name in given if name != collection))
        _, updates = model.apply(given, *inputs, mutable=frozen, **kwargs)
        return unfreeze(updates[collection])

    return update, arrays, unfreeze(variables.get(collection, {}))


def _of_nnx(model: Any, kwargs: dict[str, Any]) -> tuple[Update, Any, Any]:
    from flax import nnx

    from jaxqat.quant._models.nnx import QuantizedNNX

    if not isinstance(model, nnx.Module):
        raise QuantizationError(
            "Running statistics are those of a Linen or an NNX module, or of what "
            f"`jaxqat.quantize` made of one, got {type(model).__name__}."
        )
    training = nnx.clone(model)
    training.train()
    if isinstance(training, QuantizedNNX):
        training.use_running_average = True  # Of ranges: they do not move.
    graph, statistics, rest = nnx.split(training, nnx.BatchStat, ...)

    def update(rest: Any, statistics: Any, inputs: tuple[Any, ...]) -> Any:
        module = nnx.merge(graph, statistics, rest, copy=True)
        module(*inputs, **kwargs)
        return nnx.state(module, nnx.BatchStat)

    return update, rest, statistics


def _momentum(update: Any, old: list[Any], inputs: tuple[Any, ...], paths: list[str]) -> list[Any]:
    """Return how much of each old statistic one batch leaves; None where it stays as it is.

    A running average is s' = m s + (1 - m) b with the statistic b of the batch. In training mode b
    does not depend on s, so two values of s give m; a third one shows that it is such an average.
    """
    stays = [bool(jnp.all(new == s)) for new, s in zip(update(old, inputs), old, strict=True)]
    if all(stays):
        raise QuantizationError(
            "No running statistic changes on the batch: batch norm is in inference mode. Select "
            "training mode with the model's keyword arguments, such as train=True."
        )
    start = [s if same else jnp.zeros_like(s) for s, same in zip(old, stays, strict=True)]
    low = update(start, inputs)
    # Of the size of what is added, so that m keeps its digits.
    other = [
        s if same else 1 + 100 * jnp.abs(value)
        for s, same, value in zip(old, stays, low, strict=True)
    ]
    high = update(other, inputs)
    between = update([s if same else s / 2 for s, same in zip(other, stays, strict=True)], inputs)
    momentum: list[Any] = []
    for path, same, *values in zip(paths, stays, other, low, between, high, strict=True):
        if same:
            momentum.append(None)
            continue
        s, a, half, b = (np.asarray(value, np.float64) for value in values)
        _check_finite(1, path, a)
        slopes = (b - a) / s
        m = float(np.median(slopes))
        is_affine = np.allclose(half - a, (b - a) / 2, rtol=1e-3, atol=1e-3)
        if not (is_affine and -1e-3 < m < 1 - 1e-6 and np.allclose(slopes, m, rtol=0, atol=1e-3)):
            raise QuantizationError(
                f"The statistic {path!r} does not follow a running average s' = m s + (1 - m) b "
                "with the statistic b of the batch, so it cannot be estimated anew."
            )
        momentum.append(max(m, 0.0))
    return momentum


def _of_batch(
    update: Any, old: list[Any], momentum: list[Any], inputs: tuple[Any, ...]
) -> list[Any]:
    """Return the statistics of one batch."""
    start = [s if m is None else jnp.zeros_like(s) for s, m in zip(old, momentum, strict=True)]
    return [
        np.asarray(value, np.float64) / (1.0 if m is None else 1 - m)
        for value, m in zip(update(start, inputs), momentum, strict=True)
    ]


def _check_batch(number: int, paths: list[str], momentum: list[Any], found: list[Any]) -> None:
    """Refuse statistics of a batch that are not finite, and variances over one value."""
    for path, m, value in zip(paths, momentum, found, strict=True):
        if m is not None:
            _check_finite(number, path, value)
    for layer, mean, var in _layers(paths):
        changes = momentum[mean] is not None and np.any(found[mean])
        # Variances over one value are 0 but for the rounding of x**2 - x * x.
        if changes and np.all(found[var] <= 1e-6 * found[mean] ** 2):
            raise QuantizationError(
                f"The variance of batch {number} is 0 in every channel of {layer}: the layer sees "
                "one value for each channel, or always the same. Pass batches of many examples."
            )


def _check_finite(number: int, path: str, value: Any) -> None:
    if not np.isfinite(value).all():
        raise QuantizationError(
            f"Batch {number} gives a {path!r} that is not finite: its inputs, or the model's "
            "values on them, are NaN or infinite."
        )


def _layers(paths: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield the layers that have a mean and a variance, with the places of both."""
    index = {path: i for i, path in enumerate(paths)}
    for path in paths:
        layer, _, name = path.rpartition("/")
        other = index.get(f"{layer}/var" if layer else "var")
        if name == "mean" and other is not None:
            yield layer or "batch norm", index[path], other


def _unconverged(
    paths: list[str], old: list[Any], new: list[Any], seen: list[list[Any]]
) -> tuple[str, ...]:
    """Return the layers whose running statistics are off, with the channels that are."""
    if len(seen) < 2:
        return ()
    found: list[str] = []
    for layer, mean, var in _layers(paths):
        spread = [np.std([batch[i] for batch in seen], axis=0, ddof=1) for i in (mean, var)]
        moved = [np.abs(np.asarray(old[i], np.float64) - new[i]) for i in (mean, var)]
        unlikely = [m > OF_BATCHES * s for m, s in zip(moved, spread, strict=True)]
        deviation = np.sqrt(np.maximum(new[var], np.finfo(np.float32).tiny))
        far_mean = moved[0] > OF_VALUES * deviation
        far_var = np.abs(np.sqrt(np.maximum(old[var], 0)) - deviation) > OF_VALUES * deviation
        off = (unlikely[0] & far_mean) | (unlikely[1] & far_var)
        if off.mean() > SHARE_OF_CHANNELS:
            found.append(f"{layer} ({off.sum()} of {off.size} channels)")
    return tuple(found)
