# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Mistakes in a call of a quantized model that would give a result without meaning."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.core import DenyList
from flax.core.scope import in_filter
from jax.core import Tracer

from jaxqat.errors import QuantizationError
from jaxqat.quant._models.state import QUANT
from jaxqat.quant._numerics.ranges import Range
from jaxqat.quant._plan.plan import Plan
from jaxqat.quant._trace.arguments import Key

BATCH_STATS = "batch_stats"


def check_seen(plan: Plan, state: Mapping[Key, Range]) -> None:
    """Refuse frozen ranges that have seen no data; inside of `jax.jit` they cannot be looked at.

    Raises:
        QuantizationError: Names the first tensor.
    """
    counts = {key: state[key]["count"] for key in plan.empty_state() if key in state}
    if any(isinstance(count, Tracer) for count in counts.values()):
        return
    unseen = ["/".join(key) for key, count in counts.items() if not np.asarray(count).any()]
    if unseen:
        raise QuantizationError(
            f"The range of {unseen[0]!r} has seen no data ({len(unseen)} of {len(counts)} ranges "
            "in all), so its codes mean nothing. Call `calibrate` on a few batches first, and pass "
            "the variables that it returns."
        )


def check_mutable(mutable: Any, variables: Mapping[str, Any]) -> None:
    """Refuse a training step of batch norm that leaves the ranges behind.

    Raises:
        QuantizationError: `mutable` names 'batch_stats' and not 'quant'.
    """
    if isinstance(mutable, DenyList) or BATCH_STATS not in variables:
        return  # A DenyList names what stays frozen on purpose.
    if in_filter(mutable, BATCH_STATS) and not in_filter(mutable, QUANT):
        raise QuantizationError(
            f"mutable={mutable!r} moves batch norm's statistics but not the activation ranges, "
            "which would fall behind: pass mutable=['batch_stats', 'quant']. To freeze the ranges "
            "on purpose, pass mutable=flax.core.DenyList(('quant', 'quant_params'))."
        )


def check_input_types(plan: Plan) -> None:
    """Refuse uint8 images that a layer reads without normalization.

    Raises:
        QuantizationError: Names the tensor.
    """
    for node in plan.program.nodes:
        if node.name != "convert_element_type" or node.equation.invars[0].aval.dtype != np.uint8:
            continue
        tensor = plan.tensors.get(node.outputs[0])
        if tensor is not None and not tensor.readers:  # A layer reads it.
            raise QuantizationError(
                f"The input is uint8, and {'/'.join(tensor.key)!r} takes its values as they are: "
                "pass what the model was trained on, such as normalized float32 images "
                "(`preprocess` makes it from a batch). If that is the raw values, pass "
                "images.astype('float32')."
            )
