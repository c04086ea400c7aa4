"""Which tensors are quantized: the inputs of layers, and what integer sums and pools need.

A tensor that a layer reads is quantized once, at its source, so all its readers see the same codes.
A residual addition behind batch norm, and the input of an average pool, need a range of their own
if the network is to run on integers throughout. The maximum of windows of codes is codes already.
"""

import dataclasses
from typing import NoReturn

from jaxqat.errors import RecipeError
from jaxqat.quant._plan.origins import Origins
from jaxqat.quant._plan.plan import QuantizedTensor
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant.recipe import Settings

# What two readers of a tensor must agree on; of two widths the larger one serves both.
_SHARED = ("activations", "act_range", "percentile")


class TensorPlanner:
    """Collects the tensors to quantize.

    Attributes:
        tensors: By variable.
    """

    def __init__(self, origins: Origins):
        self.tensors: dict[int, QuantizedTensor] = {}
        self._origins = origins
        self._uses: dict[Key, int] = {}
        self._dynamic: dict[int, str] = {}  # Paths of layers of dynamic ranges, by source.

    def add(self, data: int, key: Key, settings: Settings, path: str, is_new: bool = True) -> Key:
        """Quantize what a layer reads, at its source.

        Args:
            data: The tensor that the layer reads.
            key: Key of its range, if the source has none yet.
            settings: Of the layer.
            path: Of the layer.
            is_new: Whether the key must differ from all others; iterations of a loop share one.

        Returns:
            The key of the range.
        """
        source = self._origins.source(data)
        tensor = self.tensors.get(source)
        if tensor is None:
            key = self.unique_key(key) if is_new else key
            self.tensors[source] = QuantizedTensor(key, settings)
            return key
        self.tensors[source] = _widened(tensor, settings, path)
        return tensor.key

    def add_dynamic(self, data: int, path: str) -> None:
        """Note that a layer reads a tensor with a dynamic range: no other layer may read it."""
        self._dynamic[self._origins.source(data)] = path

    def unique_key(self, key: Key) -> Key:
        """Return a key that no other tensor has: a weight used twice meets two tensors."""
        uses = self._uses[key] = self._uses.get(key, 0) + 1
        return key if uses == 1 else (*key[:-1], f"{key[-1]}{uses}")

    def read_at(self, source: int) -> QuantizedTensor:
        """Return the quantized tensor that stands for a source, when all are known."""
        tensor = self.tensors.get(source)
        if tensor is None:
            before = self._origins.quantized_before(source, self.tensors)
            tensor = self.tensors[before or source]
        return tensor

    def finish(self) -> None:
        """Merge maxima of windows with what they pick from; add additions and pools before.

        Raises:
            RecipeError: Two layers that read the same tensor disagree about it.
        """
        for number in sorted(self.tensors, reverse=True):
            before = self._origins.quantized_before(number, self.tensors)
            if before is not None:
                popped = self.tensors.pop(number)
                path = "/".join(popped.key[:-1])
                self.tensors[before] = _widened(self.tensors[before], popped.settings, path)
        for number, path in self._dynamic.items():
            before = self._origins.quantized_before(number, self.tensors)
            tensor = self.tensors.get(number if before is None else before)
            if tensor is not None:
                _refuse(path, tensor, "act_range", "dynamic")
        self._add_before()

    def _add_before(self) -> None:
        waiting = sorted(self.tensors)
        while waiting:
            number = waiting.pop()
            found = self._origins.before(number, self.tensors)
            if found is not None and found[0] not in self.tensors:
                before, label = found
                tensor = self.tensors[number]
                key = self.unique_key((*tensor.key[:-1], label))
                self.tensors[before] = QuantizedTensor(key, tensor.settings)
                waiting.append(before)


def _widened(tensor: QuantizedTensor, settings: Settings, path: str) -> QuantizedTensor:
    """Return the tensor with codes wide enough for one more reader, the layer of this path."""
    for field in _SHARED:
        if getattr(tensor.settings, field) != getattr(settings, field):
            _refuse(path, tensor, field, getattr(settings, field))
    bits = max(tensor.bits, settings.act_bits or 0)
    return dataclasses.replace(tensor, settings=dataclasses.replace(tensor.settings, act_bits=bits))


def _refuse(path: str, tensor: QuantizedTensor, field: str, value: object) -> NoReturn:
    raise RecipeError(
        f"quant.rules: {path} and {'/'.join(tensor.key[:-1])} read the same tensor, "
        f"which cannot have {field} {value!r} and {getattr(tensor.settings, field)!r} at once."
    )
