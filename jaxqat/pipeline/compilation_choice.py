"""Choose how a run's training steps are compiled: by a measurement, once for the whole run.

The measurement trains a residual block as wide as the network's first stage, on as many images and
pixels, since convolutions there take most of the time; of a network of the user's own, it trains
the whole. Its result is cached for this processor, version of jaxlib and shape. The choice is
written to the run folder, since a resumed run must give the same bits.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxqat.errors import InputError
from jaxqat.integer._store.files import write_json
from jaxqat.pipeline.hashing import json_sha256
from jaxqat.pipeline.machine import processor
from jaxqat.pipeline.models import probe_block
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.terminal import tell
from jaxqat.pipeline.training import COMPILATIONS, DEFAULT, Compilation
from jaxqat.quant._models.training_step import is_supported

ROUNDS = 3
# XLA's own way unless another one is faster by more than the noise of the measurement.
LEAST_GAIN = 1.1
# Values in the first stage's tensor of a batch, or multiplications of a batch of an own network: as
# many as 16 convolutions of 16 channels do on these values. Steps on fewer take milliseconds in any
# way, less than the measurement could ever save.
LEAST_VALUES = 2**18
LEAST_MACS = LEAST_VALUES * 16 * 9 * 16


def find_compilation(networks: Networks, folder: RunFolder, console: Console) -> Compilation:
    """Return how a run's training steps are compiled; decide it if it is a new run.

    Raises:
        RunFolderError: If RUN/compilation.json is damaged or cannot be written.
        InputError: If this version of jaxlib lacks the compiler options of the named or kept way.
    """
    if jax.default_backend() != "cpu":
        return DEFAULT
    wanted, name = networks.experiment.compilation, folder.read_compilation()
    if wanted != "auto":
        return _checked(wanted, "compilation")
    if name is not None:
        return _checked(name, str(folder.compilation))
    if not is_supported():
        return DEFAULT
    key = _key(networks)
    seconds = {} if _is_small(networks) else _read_cache().get(json_sha256(key))
    if seconds is None:
        tell("Measuring how training steps compile best on this processor", console)
        seconds = measure(networks)
        _write_cache({**_read_cache(), json_sha256(key): seconds})
    name = fastest(seconds)
    content = {"compilation": name, "seconds": seconds, **key}
    write_json(folder.compilation, content, error=RunFolderError)
    return COMPILATIONS[name]


def _is_small(networks: Networks) -> bool:
    experiment = networks.experiment
    if experiment.model.target is not None:
        macs = sum(layer.macs for layer in networks.describe())
        return experiment.fp32.batch_size * macs < LEAST_MACS
    _, shape = probe_block(experiment.model, networks.dataset.image_shape, jnp.float32)
    return experiment.fp32.batch_size * math.prod(shape) < LEAST_VALUES


def _checked(name: str, source: str) -> Compilation:
    if COMPILATIONS[name].fast and not is_supported():
        raise InputError(
            f"{source}: {name!r} needs compiler options that jaxlib "
            f"{importlib.metadata.version('jaxlib')} does not have; use --compilation default."
        )
    return COMPILATIONS[name]


def fastest(seconds: dict[str, float]) -> str:
    """Return the name of the fastest compilation, or the default if none is clearly faster."""
    if not seconds:
        return DEFAULT.name
    best = min(seconds, key=lambda name: seconds[name])
    clear = seconds[DEFAULT.name] >= LEAST_GAIN * seconds[best]
    return best if clear else DEFAULT.name


def measure(networks: Networks) -> dict[str, float]:
    """Return the seconds of a training step of a residual block, with each compilation.

    Of an own network, a training step of the whole.
    """
    experiment = networks.experiment
    dtype = jnp.bfloat16 if experiment.precision == "bfloat16" else jnp.float32
    if experiment.model.target is not None:
        block, shape = networks.modules["fp32"], networks.dataset.image_shape
        dtype = jnp.float32  # Of the images.
    else:
        block, shape = probe_block(experiment.model, networks.dataset.image_shape, dtype)
    x = np.random.default_rng(0).normal(size=(experiment.fp32.batch_size, *shape))
    x = jnp.asarray(x, dtype)
    variables = dict(block.init(jax.random.key(0), x[:1], train=False))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        collections = {name: v for name, v in variables.items() if name != "params"}
        result, _ = block.apply(
            {"params": params, **collections},
            x,
            train=True,
            mutable=list(collections),
            rngs={"params": jax.random.key(0)},
        )
        return jnp.sum(jnp.square(result.astype(jnp.float32)))

    with matmul_precision(experiment):
        steps = {
            name: each.compile(jax.jit(jax.grad(loss, (0, 1))), variables["params"], x)
            for name, each in COMPILATIONS.items()
        }
    seconds = dict.fromkeys(steps, math.inf)
    for _ in range(1 + ROUNDS):  # The first call of each is slower, and the least time counts.
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(variables["params"], x))
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _key(networks: Networks) -> dict[str, Any]:
    experiment = networks.experiment
    return {
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "model": dataclasses.asdict(experiment.model),
        "image_shape": list(networks.dataset.image_shape),
        "batch_size": experiment.fp32.batch_size,
        "precision": experiment.precision,
    }


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxqat" / "compilation.json"


def _read_cache() -> dict[str, dict[str, float]]:
    """Return the measured seconds by key; nothing if the cache is missing or damaged."""
    try:
        content = json.loads(_cache().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {
        key: seconds
        for key, seconds in entries
        if isinstance(seconds, dict) and set(seconds) == set(COMPILATIONS)
    }


def _write_cache(content: dict[str, dict[str, float]]) -> None:
    """Write the cache; without one, the next new run measures again."""
    try:
        _cache().parent.mkdir(parents=True, exist_ok=True)
        write_json(_cache(), content)
    except OSError:
        return
