# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`verify`: compare the trained network with the deployed one, tensor by tensor, on data.

The training graph in inference mode, the integer network and an exported file each give the codes
of the same tensors, and logits. `compare` counts the codes in which two of them differ. The
contract: codes are equal, or differ by one in fewer than 1 of 100,000 places, and no image changes
its class. An image all of whose codes are equal has equal results, too, to the last bit.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.integer._execute.executor import Executor, make_executor
from jaxqat.integer.graph import IntegerGraph
from jaxqat.quant.models.batches import each_batch
from jaxqat.quant.models.bound import QuantizedModel

MOST_DIFFERING = 1e-5
LARGEST_DIFFERENCE = 1


class Observation(NamedTuple):
    """A network's tensors and result for one batch.

    Attributes:
        tensors: Codes (int8) by tensor; real values for the float network.
        logits: The result.
    """

    tensors: Mapping[str, Any]
    logits: Any


Network = Callable[[np.ndarray], Observation]
# From images to the model's input; None if they are the same.
Preprocess = Callable[[Any], Any] | None


@dataclasses.dataclass(frozen=True)
class TensorCheck:
    """Comparison of one tensor in two networks.

    Attributes:
        name: Name of the tensor in the graph.
        codes: Number of codes compared.
        differing: Number of codes that differ.
        largest: Largest difference, in codes.
        sqnr_db: Signal to quantization noise against the float network, 10 log10(sum(x**2) /
            sum((x - q)**2)), in decibels; None if there is no float network to compare with.
    """

    name: str
    codes: int
    differing: int
    largest: int
    sqnr_db: float | None


@dataclasses.dataclass(frozen=True)
class Verification:
    """Comparison of two networks.

    Attributes:
        tensors: Every tensor that both have.
        images: Number of images compared.
        top1_flips: Images whose class differs between the two.
        top1_flips_fp32: Images whose class differs between the second network and the float one;
            None if there is none to compare with.
        logits_only: Whether one of them shows no tensors, so that only classes are compared.
        results: Number of the results' values that were compared.
        differing_results: Number of them that differ.
        largest_result_difference: Largest difference of two of them; infinite if the shapes differ.
        unexplained_results: Number of differing results of images without a differing code.
        nan_inputs: Input values that are NaN. They get the code of zero in every network, so they
            make no difference, and the results do not show them.
    """

    tensors: tuple[TensorCheck, ...]
    images: int
    top1_flips: int
    top1_flips_fp32: int | None
    logits_only: bool = False
    results: int = 0
    differing_results: int = 0
    largest_result_difference: float = 0.0
    nan_inputs: int = 0
    unexplained_results: int = 0

    @property
    def codes(self) -> int:
        """Number of codes compared."""
        return sum(t.codes for t in self.tensors)

    @property
    def differing(self) -> int:
        """Number of codes that differ."""
        return sum(t.differing for t in self.tensors)

    @property
    def largest(self) -> int:
        """Largest difference of all tensors, in codes."""
        return max((t.largest for t in self.tensors), default=0)

    @property
    def failures(self) -> tuple[str, ...]:
        """Violations of the contract; empty if there are none."""
        broken: list[str] = []
        if not self.codes and not (self.logits_only and self.images):
            broken.append("no codes were compared: the networks share no tensor, or got no images")
        if self.differing >= MOST_DIFFERING * self.codes and self.differing:
            broken.append(
                f"{self.differing} of {self.codes} codes differ, the contract is fewer than 1 in "
                f"{round(1 / MOST_DIFFERING):,}"
            )
        if self.largest > LARGEST_DIFFERENCE:
            worst = max(self.tensors, key=lambda t: t.largest)
            broken.append(
                f"{worst.name}: a code differs by {worst.largest}, the contract is "
                f"{LARGEST_DIFFERENCE}"
            )
        if self.top1_flips:
            broken.append(f"{self.top1_flips} of {self.images} images change their class")
        if self.unexplained_results and not self.logits_only:
            broken.append(
                f"{self.unexplained_results} of {self.results} results differ in images whose "
                f"codes are equal (largest difference {self.largest_result_difference:.3g}): the "
                "last layer differs"
            )
        return tuple(broken)

    def __str__(self) -> str:
        lines = [
            f"{self.differing:,} of {self.codes:,} codes differ; "
            f"{self.top1_flips:,} of {self.images:,} images change their class",
            *(f"broken contract: {failure}" for failure in self.failures),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data for JSON."""
        totals = {name: getattr(self, name) for name in ("codes", "differing", "largest")}
        return {**dataclasses.asdict(self), **totals, "failures": list(self.failures)}


def verify(
    model: QuantizedModel,
    *state: Any,
    graph: IntegerGraph,
    batches: Iterable[np.ndarray],
    preprocess: Preprocess = None,
    executor: Executor | None = None,
    **kwargs: Any,
) -> Verification:
    """Compare a quantized model in inference mode with its integer network.

        jaxqat.verify(model, variables, graph=graph, batches=[images], train=False)

    Args:
        model: What `jaxqat.quantize` returned.
        *state: Its variables; nothing for a model that holds them.
        graph: What `convert` returned for it.
        batches: Images, as the integer network takes them.
        preprocess: Function from the images to the model's input; None if they are the same.
        executor: Executor of the integer network; None makes one for the present device.
        **kwargs: Keyword arguments of the model's call; they must select inference, as
            `train=False` does.

    Returns:
        The comparison; see its `failures`.

    Raises:
        QuantizationError: `batches` is one array.
    """
    trained = training_network(model, *state, preprocess=preprocess, **kwargs)
    real = float_network(model, *state, preprocess=preprocess, **kwargs)
    return compare(trained, integer_network(executor or make_executor(graph)), graph, batches, real)


def training_network(
    model: QuantizedModel, *state: Any, preprocess: Preprocess = None, **kwargs: Any
) -> Network:
    """Return the quantized model in inference mode."""
    arrays, rebuild = model.bind(*state, **kwargs).split_arrays()

    @jax.jit
    def run(arrays: Any, images: Any) -> tuple[dict[str, Any], list[Any]]:
        evaluator = rebuild(arrays).record(_prepared(images, preprocess))
        return {"/".join(k): c.codes for k, c in evaluator.codes.items()}, evaluator.results

    return lambda images: _one_result(*run(arrays, images))


def float_network(
    model: QuantizedModel, *state: Any, preprocess: Preprocess = None, **kwargs: Any
) -> Network:
    """Return the model in float, with the real values of the tensors that are quantized."""
    arrays, rebuild = model.bind(*state, **kwargs).split_arrays()

    @jax.jit
    def run(arrays: Any, images: Any) -> tuple[dict[str, Any], list[Any]]:
        evaluator = rebuild(arrays).observe(_prepared(images, preprocess))
        return {"/".join(k): x for k, x in evaluator.observed.items()}, evaluator.results

    return lambda images: _one_result(*run(arrays, images))


def integer_network(executor: Executor) -> Network:
    """Return the integer network."""
    return lambda images: Observation(executor.codes(images), executor(images))


def _prepared(images: Any, preprocess: Preprocess) -> Any:
    return images if preprocess is None else preprocess(images)


def _one_result(tensors: Mapping[str, Any], results: list[Any]) -> Observation:
    if len(results) != 1:
        raise ValueError(f"the model returns {len(results)} arrays; one is needed to verify it.")
    return Observation(tensors, results[0])


def compare(
    expected: Network,
    actual: Network,
    graph: IntegerGraph,
    batches: Iterable[np.ndarray],
    real: Network | None = None,
) -> Verification:
    """Run two networks on the same images and count the codes that differ.

    Args:
        expected: The reference.
        actual: The network to check.
        graph: Scales and zero points of the tensors.
        batches: Images.
        real: The float network; None leaves out SQNR.
    """
    sums: dict[str, _Sums] = {}
    results = _Results()
    images = flips = flips_fp32 = nan_inputs = 0
    logits_only = False
    for batch in each_batch(batches):
        left, right = expected(batch), actual(batch)
        floats = None if real is None else real(batch)
        has_differing = np.zeros(len(batch), bool)
        for name in left.tensors.keys() & right.tensors.keys():
            codes = np.asarray(right.tensors[name], np.int32)
            entry = sums.setdefault(name, _Sums())
            has_differing |= entry.compare(np.asarray(left.tensors[name], np.int32), codes)
            if floats is not None and name in floats.tensors:
                tensor = graph.tensors[name]
                value = (codes - tensor.zero_point) * np.float64(tensor.scale)
                entry.measure(np.asarray(floats.tensors[name], np.float64), value)
        images += len(batch)
        nan_inputs += _nans(batch)
        logits_only = not left.tensors or not right.tensors
        results.compare(np.asarray(left.logits), np.asarray(right.logits), has_differing)
        classes = np.asarray(right.logits).argmax(-1)
        flips += int((np.asarray(left.logits).argmax(-1) != classes).sum())
        if floats is not None:
            flips_fp32 += int((np.asarray(floats.logits).argmax(-1) != classes).sum())
    # In the order of the graph.
    checks = tuple(sums[name].check(name) for name in graph.tensors if name in sums)
    flips_to_real = None if real is None else flips_fp32
    return Verification(
        checks,
        images,
        flips,
        flips_to_real,
        logits_only,
        results.values,
        results.differing,
        results.largest,
        nan_inputs,
        results.unexplained,
    )


def _nans(batch: Any) -> int:
    """Return how many values are NaN; integers are not."""
    floats = jnp.issubdtype(batch.dtype, jnp.floating)
    return int(np.isnan(np.asarray(batch, np.float32)).sum()) if floats else 0


@dataclasses.dataclass
class _Results:
    """Counts of the results over all batches."""

    values: int = 0
    differing: int = 0
    largest: float = 0.0
    unexplained: int = 0

    def compare(self, left: np.ndarray, right: np.ndarray, has_differing: np.ndarray) -> None:
        """Count results that differ, and those of images without a differing code apart."""
        if left.shape != right.shape:
            size = max(left.size, right.size)
            self.values += size
            self.differing += size
            self.unexplained += size
            self.largest = np.inf
            return
        right = right.astype(left.dtype)  # A model may return bfloat16.
        same = (left == right) | ((left != left) & (right != right))  # NaN is like NaN.
        self.values += left.size
        self.differing += int((~same).sum())
        self.unexplained += int((~same[~has_differing]).sum())
        difference = np.abs(left.astype(np.float64) - right.astype(np.float64))
        self.largest = max(self.largest, float(np.where(same, 0.0, difference).max(initial=0.0)))


@dataclasses.dataclass
class _Sums:
    """Counts and sums of one tensor over all batches."""

    codes: int = 0
    differing: int = 0
    largest: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def compare(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Count codes that differ; return the images that have such codes."""
        difference = np.abs(left - right)
        self.codes += difference.size
        self.differing += int((difference > 0).sum())
        self.largest = max(self.largest, int(difference.max(initial=0)))
        return np.asarray(difference.any(tuple(range(1, difference.ndim))))

    def measure(self, real: np.ndarray, value: np.ndarray) -> None:
        self.signal += float((real**2).sum())
        self.noise += float(((real - value) ** 2).sum())

    def check(self, name: str) -> TensorCheck:
        sqnr = in_decibels(self.signal, self.noise)
        return TensorCheck(name, self.codes, self.differing, self.largest, sqnr)


def in_decibels(signal: float, noise: float) -> float | None:
    """Return 10 log10(signal / noise); None if one of them is 0."""
    return float(10 * np.log10(signal / noise)) if signal > 0 and noise > 0 else None
