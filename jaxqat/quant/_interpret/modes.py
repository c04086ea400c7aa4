"""What an evaluation does: to ranges, and which layers it quantizes."""

import enum
from collections.abc import Mapping
from typing import Any

from jaxqat.quant._forms.operand import any_of
from jaxqat.quant._plan.plan import Plan, QuantizedTensor


class Mode(enum.Enum):
    """What happens to activation ranges: observed in float, moved while training, or frozen."""

    CALIBRATE = enum.auto()
    TRAIN = enum.auto()
    FROZEN = enum.auto()


# Whether each layer is quantized, by its path: booleans, known only when the program runs.
Switches = Mapping[str, Any]


class LayerSwitches:
    """Tells which layers and tensors are quantized: True without switches, else an array."""

    def __init__(self, plan: Plan, switches: Switches | None):
        self._table, self._switches = plan.table, switches
        self._tensors = {tensor.key: tensor for tensor in plan.tensors.values()}

    def layer(self, path: str) -> Any:
        """Return whether the layer of this path is on."""
        return True if self._switches is None else self._switches[path]

    def tensor(self, tensor: QuantizedTensor) -> Any:
        """Return whether a layer is on that reads the tensor, or the tensor that follows it."""
        if self._switches is None:
            return True
        key = tensor.key
        while (before := self._tensors[key].reader) is not None:
            key = before
        readers = [info for info in self._table if info.range_key == key]
        return any_of(self._switches[info.path] for info in readers)
