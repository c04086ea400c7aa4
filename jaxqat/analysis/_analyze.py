"""analyze: a quantized model against itself in float, on data."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxqat.analysis._measure import Measured, Score, Sums, measure
from jaxqat.analysis.result import Analysis, LayerAnalysis, Sensitivity, TensorAnalysis
from jaxqat.errors import QuantizationError
from jaxqat.integer._verify import in_decibels
from jaxqat.quant import LayerInfo
from jaxqat.quant.models.bound import BoundModel, QuantizedModel


def analyze(
    model: QuantizedModel,
    *state: Any,
    batches: Iterable[Any],
    labels: Iterable[Any] | None = None,
    preprocess: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> Analysis:
    """Tells at which layers a quantized model in inference mode departs from itself in float.

        found = jaxqat.analyze(model, variables, batches=[images], labels=[classes], train=False)
        print(found)

    For each layer: signal to quantization noise of its weights and of its result; for each tensor
    also how much of it is clipped, and its histogram against its range. Then the network is run
    with each layer quantized alone, and with each layer alone in float: 2 L + 2 runs of one
    compiled program, which computes of each layer the product that is switched on. A layer that is
    quantized has its weights and the tensor that it reads on their grids, with the model's own
    ranges; other layers that read this tensor see it quantized.

    Args:
        model: What `jaxqat.quantize` returned.
        *state: Its variables; nothing for a model that holds them.
        batches: Inputs, a batch each; a tuple holds several arguments. Batches of one size are
            compiled once.
        labels: Integer classes, an array for each batch.
        preprocess: Makes the model's input from a batch; None if it is it.
        **kwargs: As for the model's `apply`; they say, as `train=False` does, that it is inference.

    Returns:
        The analysis; its fields are plain data, its `str` is a table.

    Raises:
        QuantizationError: There is nothing to analyze: no quantized model, layer or batch, a result
            that is not one finite array, or labels that do not fit it.
    """
    if not isinstance(model, QuantizedModel):
        raise QuantizationError(
            f"analyze takes what `jaxqat.quantize` returned, got {type(model).__name__}."
        )
    runner = _Runner(model.bind(*state, **kwargs))
    for batch, classes in _paired(batches, labels):
        given = batch if preprocess is None else preprocess(batch)
        runner.add(given if isinstance(given, tuple) else (given,), classes)
    return runner.analysis()


def _paired(
    batches: Iterable[Any], labels: Iterable[Any] | None
) -> Iterator[tuple[Any, np.ndarray | None]]:
    rest = None if labels is None else iter(labels)
    for batch in batches:
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
    """Runs batches, and sums up what they say."""

    def __init__(self, model: BoundModel):
        self.model = model
        self.arrays, self.rebuild = model.split_arrays()
        self.rows: list[LayerInfo] = []
        self.paths: list[str] = []
        self.scores: list[Score] = []
        self.total: Measured | None = None
        self.measure, self.run = jax.jit(self._measure), jax.jit(self._run)

    def _measure(self, arrays: Any, inputs: Any) -> Measured:
        model = self.rebuild(arrays)
        return measure(model.observe(*inputs), model.record(*inputs))

    def _run(self, arrays: Any, on: Any, inputs: Any) -> list[Any]:
        switches = dict(zip(self.paths, on, strict=True))
        return self.rebuild(arrays).switched(switches, *inputs).results

    def add(self, inputs: tuple[Any, ...], labels: np.ndarray | None) -> None:
        """Runs one batch in all ways."""
        if not self.rows:
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
        self.rows = [row for row in table if row.settings is not None]
        self.paths = list(dict.fromkeys(row.path for row in self.rows))
        self.scores = [Score() for _ in self._choices()]
        if not self.rows:
            raise QuantizationError(
                "No layer of the model is quantized, so there is nothing to analyze; `describe` "
                "names each with the reason."
            )

    def _choices(self) -> np.ndarray:
        """Which layers are on: none, all, each alone, all but each."""
        alone = np.eye(len(self.paths), dtype=bool)
        ends = np.zeros_like(alone[:1]), np.ones_like(alone[:1])
        return np.concatenate([*ends, alone, ~alone])

    def _result(self, on: np.ndarray, inputs: tuple[Any, ...]) -> np.ndarray:
        results = self.run(self.arrays, on, inputs)
        if len(results) != 1 or np.ndim(results[0]) == 0:
            raise QuantizationError(
                "analyze takes a model that returns one array with an axis of examples, got "
                f"{len(results)} of the shapes {', '.join(str(np.shape(r)) for r in results)}."
            )
        return np.asarray(results[0])

    def analysis(self) -> Analysis:
        """What was found."""
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
            layers=_layers(self.rows, self.total.sums),
            tensors=tuple(_tensor(name, self.total) for name in self.total.sums.tensors),
            sensitivity=tuple(sensitivity),
        )


def _layers(rows: list[LayerInfo], sums: Sums) -> tuple[LayerAnalysis, ...]:
    found = []
    for row, weights, output in zip(rows, sums.weights, sums.outputs, strict=True):
        ratios = (n and in_decibels(float(n.signal), float(n.noise)) for n in (weights, output))
        name = "/".join(row.range_key) if row.range_key else None
        found.append(
            LayerAnalysis(row.path, row.kind, row.weight_bits, row.act_bits, name, *ratios)
        )
    return tuple(found)


def _tensor(name: str, total: Measured) -> TensorAnalysis:
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
