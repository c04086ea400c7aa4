"""What an analysis found, as plain data.

Signal to quantization noise is 10 log10(sum(x**2) / sum((x - q)**2)) dB of the real values x and
the quantized network's values q in their place: 6 dB are one bit.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Effect:
    """What one choice of quantized layers does to the network's result.

    Attributes:
        sqnr_db: Signal to quantization noise of the result against the float network's; None if
            the two are equal, or all is zero.
        agreement: Share of examples whose class (largest output) is the float network's; None if
            there is one output only.
        accuracy: Share of examples whose class is the label; None without labels.
    """

    sqnr_db: float | None
    agreement: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How much depends on one layer.

    Attributes:
        path: Path of its module.
        alone: This layer is quantized, with the tensor that it reads; all others are in float.
        without: This layer is in float, all others are quantized.
    """

    path: str
    alone: Effect
    without: Effect


@dataclasses.dataclass(frozen=True)
class LayerAnalysis:
    """A quantized layer.

    Attributes:
        path: Path of its module.
        kind: 'conv', 'dense', 'embed' or 'attention'.
        weight_bits: Width of the weight codes.
        act_bits: Width of its input's codes; None of an embedding.
        input: Name of the tensor that it reads; None if that has no range of its own.
        weight_sqnr_db: Of the weights; None if they are all on the grid, or zero, or there are
            none.
        output_sqnr_db: Of its result: the noise of all layers before it is in it as well.
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
    """A quantized tensor: the float network's values against the range that was chosen.

    Attributes:
        name: Path of its range.
        low: Real value of the smallest code.
        high: Real value of the largest code.
        smallest: Smallest value that was seen.
        largest: Largest value that was seen.
        values: How many values were seen.
        clipped: Share of them whose nearest code is outside of the grid: more than half a step
            below `low` or above `high`.
        sqnr_db: Signal to quantization noise in the quantized network.
        edges: Borders of the histogram's bins, of equal width, ascending. Where clipping begins is
            one of them.
        counts: Values in each bin; those beyond the edges are in the first and the last.
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
    """A quantized network against the same network in float; `str` makes a table of it.

    Attributes:
        examples: How many were run.
        real: The float network.
        quantized: The quantized network.
        layers: Quantized products, in the order of computation.
        tensors: Quantized tensors, by name.
        sensitivity: Layers by the noise that they alone put into the result, the noisiest first.
    """

    examples: int
    real: Effect
    quantized: Effect
    layers: tuple[LayerAnalysis, ...]
    tensors: tuple[TensorAnalysis, ...]
    sensitivity: tuple[Sensitivity, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, its head first, the most sensitive layer next."""
        head = ("layer", "bits", "weights dB", "output dB", "clipped %")
        tensors = {tensor.name: tensor for tensor in self.tensors}
        more = [f"{c} {way}" for way in ("alone", "without") for c in self._columns()]
        rows: list[tuple[str, ...]] = [(*head, *more)]
        for sensitivity in self.sensitivity:
            for layer in self.layers:
                if layer.path == sensitivity.path:
                    effects = (sensitivity.alone, sensitivity.without)
                    told = (text for effect in effects for text in self._cells(effect))
                    rows.append((*_layer_cells(layer, tensors.get(layer.input or "")), *told))
        return rows

    def summary(self) -> str:
        """The two networks as wholes, in one line."""
        ratio, agreement = decibels(self.quantized.sqnr_db), self.quantized.agreement
        text = f"quantized against float, {self.examples:,} examples: SQNR {ratio} dB"
        if agreement is not None:
            text += f", {percent(agreement)} % of the classes agree"
        if self.quantized.accuracy is not None:
            accuracies = (percent(effect.accuracy) for effect in (self.real, self.quantized))
            text += ", accuracy {} % in float and {} % quantized".format(*accuracies)
        return text

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for first, *rest in rows:
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
        return "\n".join([*lines, self.summary()])

    def _columns(self) -> tuple[str, ...]:
        """Of the shares, accuracy says more than agreement; one of them is enough for a table."""
        if self.quantized.accuracy is not None:
            return ("dB", "top-1")
        return ("dB",) if self.quantized.agreement is None else ("dB", "agree")

    def _cells(self, effect: Effect) -> list[str]:
        share = effect.agreement if effect.accuracy is None else effect.accuracy
        return [decibels(effect.sqnr_db), *([] if share is None else [percent(share)])]


def _layer_cells(layer: LayerAnalysis, read: TensorAnalysis | None) -> tuple[str, ...]:
    ratios = (layer.weight_sqnr_db, layer.output_sqnr_db)
    bits = f"{layer.weight_bits}/{layer.act_bits or '–'}"
    return (layer.path, bits, *map(decibels, ratios), percent(read and read.clipped))


def decibels(ratio: float | None) -> str:
    """A ratio in dB as text."""
    return "–" if ratio is None else f"{ratio:.1f}"


def percent(share: float | None) -> str:
    """A share of 1 in percent, as text."""
    return "–" if share is None else f"{100 * share:.2f}"
