# pyright: strict
"""The result of `analyze`, as plain data.

The signal to quantization noise ratio (SQNR) of real values x and the quantized network's values q
is 10 log10(sum(x**2) / sum((x - q)**2)) dB. One bit more is about 6 dB.
"""

import dataclasses

from jaxqat.analysis._text import aligned, decibels, percent


@dataclasses.dataclass(frozen=True)
class Effect:
    """Effect on the network's result of quantizing some of its layers.

    Attributes:
        sqnr_db: SQNR of the result against the float network's, in dB; None if the two are equal,
            or the result is all zero.
        agreement: Share (0 to 1) of examples whose class (largest output) is the float network's;
            None if there is one output only.
        accuracy: Share (0 to 1) of examples whose class is the label; None without labels.
    """

    sqnr_db: float | None
    agreement: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of the network's result to the quantization of one layer.

    Attributes:
        path: Path of the layer's module.
        alone: Effect of quantizing this layer, with the tensor that it reads, and no other.
        without: Effect of quantizing all layers but this one.
    """

    path: str
    alone: Effect
    without: Effect


@dataclasses.dataclass(frozen=True)
class LayerAnalysis:
    """A quantized layer in the quantized network.

    Attributes:
        path: Path of its module.
        kind: 'conv', 'dense', 'embed' or 'attention'.
        weight_bits: Width of the weight codes, in bits; None without weights.
        act_bits: Width of the input's codes, in bits; None for an embedding.
        input: Name of the tensor that it reads; None if that has no range of its own. With a
            dynamic range, `Analysis.tensors` does not hold it.
        weight_sqnr_db: SQNR of the weights, in dB; None if they lie on the grid, are all zero, or
            do not exist.
        output_sqnr_db: SQNR of its result, in dB, with the noise of all layers before it; None if
            there is no noise.
    """

    path: str
    kind: str
    weight_bits: int | None
    act_bits: int | None
    input: str | None
    weight_sqnr_db: float | None
    output_sqnr_db: float | None


@dataclasses.dataclass(frozen=True)
class TensorAnalysis:
    """The float network's values of a tensor against the static range of its codes.

    Attributes:
        name: Path of the range.
        low: Real value of the smallest code.
        high: Real value of the largest code.
        smallest: Smallest value observed.
        largest: Largest value observed.
        values: Number of values observed.
        clipped: Share (0 to 1) of values that are clipped: more than half a unit of the grid below
            `low` or above `high`.
        sqnr_db: SQNR in the quantized network, in dB; None if there is no noise.
        edges: Edges of the histogram's bins, ascending and of equal width. Clipping begins at an
            edge on either side.
        counts: Number of values in each bin. The first and the last bin include values beyond.
    """

    name: str
    low: float
    high: float
    smallest: float
    largest: float
    values: int
    clipped: float
    sqnr_db: float | None
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A quantized network compared with the same network in float; `str` gives a table.

    Attributes:
        examples: Number of examples.
        real: Result of the float network.
        quantized: Result of the quantized network.
        layers: Quantized products, in the order of computation.
        tensors: Quantized tensors with static ranges.
        sensitivity: Sensitivity to each layer, the layer with the most noise alone first.
    """

    examples: int
    real: Effect
    quantized: Effect
    layers: tuple[LayerAnalysis, ...]
    tensors: tuple[TensorAnalysis, ...]
    sensitivity: tuple[Sensitivity, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table: the header, then a row per layer, most sensitive first."""
        header = ("layer", "bits", "weights dB", "output dB", "clipped %")
        tensors = {tensor.name: tensor for tensor in self.tensors}
        more = [f"{c} {way}" for way in ("alone", "without") for c in self._columns()]
        rows: list[tuple[str, ...]] = [(*header, *more)]
        for sensitivity in self.sensitivity:
            for layer in self.layers:
                if layer.path == sensitivity.path:
                    effects = (sensitivity.alone, sensitivity.without)
                    cells = (text for effect in effects for text in self._cells(effect))
                    rows.append((*_layer_cells(layer, tensors.get(layer.input or "")), *cells))
        return rows

    def summary(self) -> str:
        """Return one line on the whole network, quantized and in float."""
        ratio, agreement = decibels(self.quantized.sqnr_db), self.quantized.agreement
        text = f"quantized against float, {self.examples:,} examples: SQNR {ratio} dB"
        if agreement is not None:
            text += f", {percent(agreement)} % of the classes agree"
        if self.quantized.accuracy is not None:
            accuracies = (percent(effect.accuracy) for effect in (self.real, self.quantized))
            text += ", accuracy {} % in float and {} % quantized".format(*accuracies)
        return text

    def __str__(self) -> str:
        return "\n".join([*aligned(self.rows()), self.summary()])

    def _columns(self) -> tuple[str, ...]:
        """Return the header of an effect: accuracy if it is known, otherwise agreement."""
        if self.quantized.accuracy is not None:
            return ("dB", "top-1")
        return ("dB",) if self.quantized.agreement is None else ("dB", "agree")

    def _cells(self, effect: Effect) -> list[str]:
        share = effect.agreement if effect.accuracy is None else effect.accuracy
        return [decibels(effect.sqnr_db), *([] if share is None else [percent(share)])]


def _layer_cells(layer: LayerAnalysis, read: TensorAnalysis | None) -> tuple[str, ...]:
    bits = f"{layer.weight_bits}/{layer.act_bits or '–'}"
    noise = (decibels(layer.weight_sqnr_db), decibels(layer.output_sqnr_db))
    return (layer.path, bits, *noise, percent(None if read is None else read.clipped))
