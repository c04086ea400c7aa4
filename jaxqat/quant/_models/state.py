# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The two collections that quantization adds to a model's variables.

`quant` holds what is observed: ranges of activations and counts. `quant_params` holds what is
learned, step sizes and clipping bounds: gradients and optimizers treat it like `params`. Both are
nested dictionaries, keyed by module path; the interpreter reads them as one flat state.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.core import Tracer

from jaxqat.errors import QuantizationError
from jaxqat.quant._numerics.ranges import Range
from jaxqat.quant._plan.plan import LEARNED
from jaxqat.quant._trace.arguments import Key

QUANT = "quant"
QUANT_PARAMS = "quant_params"


def flat_state(collections: Mapping[str, Any]) -> dict[Key, Range]:
    """Return the state of every quantized tensor, by key, from both collections.

    Args:
        collections: A model's variables; collections other than the two are ignored.
    """
    flat: dict[Key, Range] = {}
    for name in (QUANT, QUANT_PARAMS):
        leaves: dict[Key, Any] = traverse_util.flatten_dict(dict(collections.get(name, {})))
        for path, value in leaves.items():
            flat.setdefault(path[:-1], {})[path[-1]] = value
    return flat


def state_collections(state: Mapping[Key, Range]) -> dict[str, Any]:
    """Return the collections of a flat state: `quant`, and `quant_params` if anything is learned.

    The inverse of `flat_state`.
    """
    learned = set(LEARNED.values())
    parts: dict[str, dict[Key, Any]] = {QUANT: {}, QUANT_PARAMS: {}}
    for key, tensor in state.items():
        for leaf, value in tensor.items():
            parts[QUANT_PARAMS if leaf in learned else QUANT][*key, leaf] = value
    nested: dict[str, Any] = {
        name: traverse_util.unflatten_dict(part) for name, part in parts.items()
    }
    if not nested[QUANT_PARAMS]:
        del nested[QUANT_PARAMS]
    return nested


def check_finite(state: Mapping[Key, Range]) -> None:
    """Refuse ranges that are NaN or infinite; inside of `jax.jit` they cannot be looked at.

    Raises:
        QuantizationError: Names the tensors.
    """
    leaves = [value for tensor in state.values() for value in tensor.values()]
    if any(isinstance(value, Tracer) for value in leaves):
        return
    wrong = [
        "/".join(key)
        for key, tensor in jax.device_get(dict(state)).items()
        if not all(np.isfinite(value).all() for value in tensor.values())
    ]
    if wrong:
        raise QuantizationError(
            f"The values of {', '.join(wrong)} are not finite on these batches (NaN or infinite); "
            "no range can be made of them."
        )
