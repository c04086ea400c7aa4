# pyright: strict
"""What an evaluation does: to ranges, and which layers it quantizes."""

import enum
from collections.abc import Mapping
from typing import Any, Literal

from jaxqat.quant._forms.operand import any_of
from jaxqat.quant._plan.plan import LayerInfo, Plan, QuantizedTensor
from jaxqat.quant._trace.arguments import Key


class Mode(enum.Enum):
    """What happens to activation ranges: observed in float, moved while training, or frozen."""

    CALIBRATE = enum.auto()
    TRAIN = enum.auto()
    FROZEN = enum.auto()


# What training keeps of quantized tensors for the backward pass.
Memory = Literal["values", "codes"]

# Whether each layer is quantized, by its path: booleans, known only when the program runs.
Switches = Mapping[str, Any]


class LayerSwitches:
    """Tells which layers and tensors are quantized: True without switches, else an array."""

    def __init__(self, plan: Plan, switches: Switches | None):
        self._table, self._switches = plan.table, switches
        self._tensors = plan.by_key()

    def layer(self, path: str) -> Any:
        """Return whether the layer of this path is on."""
        return True if self._switches is None else self._switches[path]

    def tensor(self, tensor: QuantizedTensor) -> Any:
        """Return whether a layer is on that reads the tensor, or a sum or a pool of it.

        A term of a sum is quantized if the sum is, and if one of its terms is computed from codes.
        """
        if self._switches is None:
            return True
        keys = self._reading(tensor.key)
        on = any_of(self._switches[info.path] for info in self._table if _reads(info, keys))
        return on & any_of(map(self._producer, tensor.producers)) if tensor.producers else on

    def _producer(self, producer: str | Key) -> Any:
        if isinstance(producer, str):
            return self.layer(producer)
        return self.tensor(self._tensors[producer])

    def _reading(self, key: Key) -> set[Key]:
        """Return the keys of a tensor and of all that are computed from it without a layer."""
        return {key}.union(*map(self._reading, self._tensors[key].readers))


def _reads(info: LayerInfo, keys: set[Key]) -> bool:
    # The table has one range for each layer; both operands of an attention product have its path.
    both = info.kind == "attention" and info.path in {"/".join(key[:-1]) for key in keys}
    return both or info.range_key in keys
