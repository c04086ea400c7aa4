"""Which tensors are quantized: inputs of layers, and what sums, pools and functions need.

A tensor that a layer reads is quantized once, at its source, so all its readers see the same codes.
A residual addition behind batch norm, and the input of an average pool, need a range of their own
if the network is to run on integers throughout. The maximum of windows of codes is codes already.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from jaxqat.errors import RecipeError
from jaxqat.quant._plan.arguments import arguments_before
from jaxqat.quant._plan.origins import Origins
from jaxqat.quant._plan.plan import LEARNED, Place, QuantizedTensor
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant._trace.program import TracedNode
from jaxqat.quant.recipe import Settings

# What two readers of a tensor must agree on; of two widths the larger one serves both.
_SHARED = ("activations", "act_range", "percentile")


class TensorPlanner:
    """Collects the tensors to quantize.

    Attributes:
        tensors: By place (`plan.Place`).
    """

    def __init__(self, origins: Origins, layers: Mapping[TracedNode, Any]):
        self.tensors: dict[Place, QuantizedTensor] = {}
        self._origins, self._layers = origins, layers
        self._uses: dict[Key, int] = {}
        self._repeated: dict[Any, Key] = {}  # Keys that iterations of a loop share.
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
        # A call whose tensor has a range already counts too: the key of the next call must not
        # depend on it, since another mode may have other readers of that tensor.
        key = self.unique_key(key) if is_new else key
        if tensor is None:
            factor = self._origins.factor(source)
            self.tensors[source] = QuantizedTensor(key, settings, factor=factor)
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

    def _key_at(self, key: Key, node: TracedNode | None, side: int = 0) -> Key:
        """Return a key for what a node makes or reads; iterations of a loop share one."""
        if node is None or not node.loop:
            return self.unique_key(key)
        same = (key, node.loop, id(node.equation), side)
        if same not in self._repeated:
            self._repeated[same] = self.unique_key(key)
        return self._repeated[same]

    def read_at(self, source: int) -> QuantizedTensor:
        """Return the quantized tensor that stands for a source, when all are known."""
        before = self._quantized_at(source)
        return self.tensors[source if before is None else before]

    def finish(self) -> None:
        """Merge maxima of windows with what they pick from; add additions and pools before.

        Raises:
            RecipeError: Two layers that read the same tensor disagree about it.
        """
        for number in self._variables()[::-1]:
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

    def _variables(self) -> list[int]:
        return sorted(place for place in self.tensors if isinstance(place, int))

    def _add_before(self) -> None:
        waiting = [(number, self.tensors[number]) for number in self._variables()]
        while waiting:
            number, tensor = waiting.pop()
            found = self._origins.before(number, self.tensors)
            if found is not None and found[0] not in self.tensors:
                before, label = found
                maker = self._origins.program.made_by.get(before)
                key = self._key_at((*tensor.key[:-1], label), maker)
                self.tensors[before] = QuantizedTensor(
                    key, tensor.settings, (tensor.key,), factor=self._origins.factor(before)
                )
                waiting.append((before, self.tensors[before]))
            before = arguments_before(self._origins, number, self.tensors, self._layers)
            for argument in before:
                waiting += self._add_argument(argument, tensor)
            for node in self._origins.sums_before(number, self.tensors):
                waiting += self._add_terms(node, tensor)

    def _add_argument(
        self, number: int, result: QuantizedTensor
    ) -> list[tuple[int, QuantizedTensor]]:
        """Quantize the argument of a function; return it, unless it is quantized already."""
        source = self._origins.source(number)
        known = self._quantized_at(source)
        if known is not None and self.tensors[known].readers:  # No layer reads it.
            self.tensors[known] = _read_by(self.tensors[known], result)
        if known is not None or source in self._dynamic:
            return []
        maker = self._origins.program.made_by.get(source)
        key = self._key_at((*result.key[:-1], "argument"), maker)
        tensor = QuantizedTensor(key, _of_terms(result.settings), (result.key,))
        self.tensors[source] = tensor
        return [(source, tensor)]

    def _add_terms(
        self, node: TracedNode, total: QuantizedTensor
    ) -> list[tuple[int, QuantizedTensor]]:
        """Quantize the terms of a residual addition; return those that were not quantized yet."""
        sources = [self._origins.source(a) for a in node.inputs if isinstance(a, int)]
        if any(source in self._dynamic for source in sources):
            return []  # Codes of such a tensor have a scale for each example.
        producers = self._producers(sources)
        if not producers:
            return []  # Nothing before the sum is quantized.
        places = [self._place(node, side, source) for side, source in enumerate(sources)]
        new = [i for i, place in enumerate(places) if place not in self.tensors]
        for i in new:
            if places[i] not in self.tensors:  # Both operands can be one tensor.
                self.tensors[places[i]] = self._term(node, i, sources[i], total, producers)
        keys = [self.tensors[place].key for place in places]
        for i, place in enumerate(places):
            self.tensors[place] = _read_by(self.tensors[place], total, keys[1 - i], i in new)
        return [(sources[i], self.tensors[places[i]]) for i in new]

    def _place(self, node: TracedNode, side: int, source: int) -> Place:
        """Return where a term is quantized: its variable, or the operand of the sum alone.

        A layer's result with readers other than sums stays as it is for those: batch norm, for
        one, needs its accumulators.
        """
        quantized = self._quantized_at(source)
        if quantized is not None:
            return quantized
        return source if self._origins.is_read_by_sums(source) else (node, side)

    def _quantized_at(self, source: int) -> int | None:
        """Return the quantized tensor that a source is, or has maxima of."""
        if source in self.tensors:
            return source
        return self._origins.quantized_before(source, self.tensors)

    def _producers(self, sources: list[int]) -> tuple[str | Key, ...]:
        """Return paths of layers and keys of tensors from whose codes a sum is computed."""
        found = [
            x for s in sources for x in self._origins.codes_before(s, self.tensors, self._layers)
        ]
        return tuple(
            self.tensors[x].key if isinstance(x, int) else self._layers[x].path for x in found
        )

    def _term(
        self,
        node: TracedNode,
        side: int,
        source: int,
        total: QuantizedTensor,
        producers: tuple[str | Key, ...],
    ) -> QuantizedTensor:
        layer = self._origins.layer_before(source, self._layers)
        path = None if layer is None else self._layers[layer].path
        key = (*total.key[:-1], "term") if path is None else (*path.split("/"), "output")
        settings = _of_terms(total.settings)
        key = self._key_at(key, node, side)
        return QuantizedTensor(key, settings, (total.key,), producers=producers)


def _read_by(
    tensor: QuantizedTensor, total: QuantizedTensor, other: Key | None = None, is_new: bool = False
) -> QuantizedTensor:
    """Return a tensor that one more sum or function reads.

    Only the term of a single sum, the term beside `other`, is cut to what the sum can show.
    """
    if not tensor.readers:  # Layers read it too.
        return tensor
    if is_new:
        return dataclasses.replace(tensor, other_term=other)
    readers = tuple(dict.fromkeys((*tensor.readers, total.key)))  # Two sums can be in one total.
    return dataclasses.replace(tensor, readers=readers, other_term=None)


def _of_terms(settings: Settings) -> Settings:
    """Return the settings of a sum's terms: 8 bits, as no layer multiplies them, and no learned
    scale, as the range is cut to what the sum can show (`States`).
    """
    learned = settings.act_range in LEARNED
    act_range = "ema" if learned else settings.act_range
    return dataclasses.replace(settings, act_bits=8, act_range=act_range)


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
