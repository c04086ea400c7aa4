# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`analyze`: compare a quantized model with the same model in float, on data."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxqat.analysis._measure import Measurements, Score, Totals, measure
from jaxqat.analysis.result import Analysis, LayerAnalysis, Sensitivity, TensorAnalysis
from jaxqat.errors import QuantizationError
from jaxqat.integer._compare import in_decibels
from jaxqat.quant import LayerInfo
from jaxqat.quant._models.batches import as_arguments, each_batch
from jaxqat.quant._models.bound import BoundModel, QuantizedModel, check_quantized


def analyze(
    model: QuantizedModel,
    *state: Any,
    batches: Iterable[Any],
    labels: Iterable[Any] | None = None,
    preprocess: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> Analysis:
    """Find the layers where a quantized model in inference mode loses accuracy.

        found = jaxqat.analyze(model, variables, batches=[images], labels=[classes], train=False)
        print(found)

    The analysis holds the signal to quantization noise ratio of each layer's weights and result,
    and for each tensor with a static range its clipped share and histogram. It also holds the
    sensitivity to each layer: the network runs with this layer quantized alone, and with this layer
    alone in float. For L layers these are 2 L + 2 runs of one compiled program per batch. A
    quantized layer has its weights and the tensor that it reads on their grids, with the model's
    own ranges; other layers that read this tensor read the quantized values.

    Args:
        model: What `jaxqat.quantize` returned.
        *state: Its variables; nothing for a model that holds them.
        batches: Batches of inputs; a tuple holds several arguments. Each batch size is compiled
            once.
        labels: Integer classes, one array for each batch.
        preprocess: Function from a batch to the model's input; None if they are the same.
        **kwargs: Keyword arguments of the model's call; they must select inference, as
            `train=False` does.

    Returns:
        The analysis: its fields are plain data, its `str` is a table.

    Raises:
        QuantizationError: The model is not quantized or has no quantized layer, there is no batch,
            `batches` is one array, the result is not one finite array, or the labels do not fit it.
    """
    check_quantized(model, "analyze")
    runner = _Runner(model.bind(*state, **kwargs))
    for batch, classes in _paired(batches, labels):
        runner.add(as_arguments(batch if preprocess is None else preprocess(batch)), classes)
    return runner.analysis()


def _paired(
    batches: Iterable[Any], labels: Iterable[Any] | None
) -> Iterator[tuple[Any, np.ndarray | None]]:
    rest = None if labels is None else iter(labels)
    for batch in each_batch(batches):
        if rest is None:
            yield batch, None
            continue
        try:
            yield batch, np.asarray(next(rest))
        except StopIteration:
            raise QuantizationError(
                "`labels` ends before `batches`: give an array of classes for each batch."
            ) from None


class _Runner:
    """Run batches in all combinations of quantized layers, and accumulate the measurements."""

    def __init__(self, model: BoundModel):
        self.model = model
        self.arrays, self.rebuild = model.split_arrays()
        self.layers: list[LayerInfo] = []
        self.paths: list[str] = []
        self.scores: list[Score] = []
        self.total: Measurements | None = None
        self.measure, self.run = jax.jit(self._measure), jax.jit(self._run)

    def _measure(self, arrays: Any, inputs: Any) -> Measurements:
        model = self.rebuild(arrays)
        return measure(model.observe(*inputs), model.record(*inputs))

    def _run(self, arrays: Any, on: Any, inputs: Any) -> list[Any]:
        switches = dict(zip(self.paths, on, strict=True))
        return self.rebuild(arrays).switched(switches, *inputs).results

    def add(self, inputs: tuple[Any, ...], labels: np.ndarray | None) -> None:
        """Run one batch with every choice of quantized layers."""
        if not self.layers:
            self._plan(inputs)
        found = self.measure(self.arrays, inputs).on_host()
        self.total = found if self.total is None else self.total.plus(found)
        results = [self._result(on, inputs) for on in self._choices()]
        if labels is not None and labels.shape != results[0].shape[:-1]:
            raise QuantizationError(
                f"labels must have the shape {results[0].shape[:-1]}, a class for each example of "
                f"the batch, got {labels.shape}."
            )
        for score, result in zip(self.scores, results, strict=True):
            score.add(result, results[0], labels)

    def _plan(self, inputs: tuple[Any, ...]) -> None:
        table = self.model.layers(*inputs)
        self.layers = [layer for layer in table if layer.settings is not None]
        self.paths = list(dict.fromkeys(layer.path for layer in self.layers))
        self.scores = [Score() for _ in self._choices()]
        if not self.layers:
            raise QuantizationError(
                "No layer of the model is quantized, so there is nothing to analyze; `describe` "
                "lists the layers and the reasons."
            )

    def _choices(self) -> np.ndarray:
        """Return the quantized layers of each run: none, all, each alone, all but each."""
        alone = np.eye(len(self.paths), dtype=bool)
        ends = np.zeros_like(alone[:1]), np.ones_like(alone[:1])
        return np.concatenate([*ends, alone, ~alone])

    def _result(self, on: np.ndarray, inputs: tuple[Any, ...]) -> np.ndarray:
        results = self.run(self.arrays, on, inputs)
        if len(results) != 1 or np.ndim(results[0]) == 0:
            raise QuantizationError(
                "analyze needs a model that returns one array with an axis of examples, got "
                f"{len(results)} of the shapes {', '.join(str(np.shape(r)) for r in results)}."
            )
        return np.asarray(results[0])

    def analysis(self) -> Analysis:
        """Return the analysis of all batches."""
        if self.total is None:
            raise QuantizationError("There is no batch to analyze: `batches` is empty.")
        real, quantized, *effects = (score.effect() for score in self.scores)
        ways = zip(effects[: len(self.paths)], effects[len(self.paths) :], strict=True)
        sensitivity = [Sensitivity(p, *way) for p, way in zip(self.paths, ways, strict=True)]
        sensitivity.sort(key=lambda s: np.inf if s.alone.sqnr_db is None else s.alone.sqnr_db)
        return Analysis(
            examples=self.scores[0].examples,
            real=real,
            quantized=quantized,
            layers=_layers(self.layers, self.total.sums),
            tensors=tuple(_tensor(name, self.total) for name in self.total.sums.tensors),
            sensitivity=tuple(sensitivity),
        )


def _layers(infos: list[LayerInfo], sums: Totals) -> tuple[LayerAnalysis, ...]:
    found: list[LayerAnalysis] = []
    for info, weights, output in zip(infos, sums.weights, sums.outputs, strict=True):
        ratios = (n and in_decibels(float(n.signal), float(n.noise)) for n in (weights, output))
        name = "/".join(info.range_key) if info.range_key else None
        found.append(
            LayerAnalysis(info.path, info.kind, info.weight_bits, info.act_bits, name, *ratios)
        )
    return tuple(found)


def _tensor(name: str, total: Measurements) -> TensorAnalysis:
    spread, noise, edges = total.sums.spreads[name], total.sums.tensors[name], total.edges[name]
    (smallest, negated), (low, high) = total.extremes[name], total.ends[name]
    values = int(np.sum(spread.counts))
    return TensorAnalysis(
        name=name,
        low=float(low),
        high=float(high),
        smallest=float(smallest),
        largest=float(-negated),
        values=values,
        clipped=int(spread.clipped) / values,
        sqnr_db=in_decibels(float(noise.signal), float(noise.noise)),
        edges=tuple(edges.tolist()),
        counts=tuple(spread.counts.tolist()),
    )
