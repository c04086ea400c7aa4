# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The comparison of two networks on data: how many codes differ, and the contract for it.

Networks give the codes of the same tensors, and logits. `compare` counts the codes in which two of
them differ. The contract: codes are equal, or differ by one in fewer than 1 of 100,000 places, and
no image changes its class. An image all of whose codes are equal has equal results, too, to the
last bit.

A float island rounds floats, so two programs can differ by a code at its end, and what follows
differs with it. So each integer part is computed from the reference's codes at its entry, and the
contract holds for it. The tensors that islands make may differ by one in fewer than 1 of 200 places
(two float32 programs differ by some 1e-5 of a value, and values are up to 255 units of a grid), and
end to end 1 of 100 images may change its class; results that an island computes may differ by 1e-4
of the largest.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.errors import ExecutionError
from jaxqat.integer.graph import FloatOp, IntegerGraph, Node
from jaxqat.quant._models.batches import each_batch

MOST_DIFFERING = 1e-5
LARGEST_DIFFERENCE = 1
# With float islands.
MOST_DIFFERING_OF_ISLANDS = 5e-3
MOST_FLIPS = 1e-2
LARGEST_RESULT_DIFFERENCE = 1e-4


class Observation(NamedTuple):
    """A network's tensors and result for one batch.

    Attributes:
        tensors: Codes (int8) by tensor; real values for the float network.
        results: The arrays of the result, in the order of the graph's outputs.
    """

    tensors: Mapping[str, Any]
    results: Sequence[Any]


# From a batch, an array or a tuple of the model's arguments.
Network = Callable[[Any], Observation]
# From a batch and the codes at the entries of integer parts to what each part makes of them.
Segments = Callable[[Any, Mapping[str, Any]], Observation]


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
        of_island: Whether a float island makes the tensor, or one that the reference does not show
            is before it.
        island: The module of the float island that makes it; empty if it is no result of one.
    """

    name: str
    codes: int
    differing: int
    largest: int
    sqnr_db: float | None
    of_island: bool = False
    island: str = ""


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
        end_to_end: With float islands, number of codes that differ end to end; `tensors` compares
            each integer part by itself. None without.
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
    end_to_end: int | None = None

    @property
    def codes(self) -> int:
        """Number of codes compared, without those that float islands make."""
        return sum(t.codes for t in self.tensors if not t.of_island)

    @property
    def differing(self) -> int:
        """Number of codes that differ, without those that float islands make."""
        return sum(t.differing for t in self.tensors if not t.of_island)

    @property
    def island_codes(self) -> int:
        """Number of codes compared of tensors that float islands make."""
        return sum(t.codes for t in self.tensors if t.of_island)

    @property
    def island_differing(self) -> int:
        """Number of them that differ."""
        return sum(t.differing for t in self.tensors if t.of_island)

    @property
    def largest(self) -> int:
        """Largest difference of all tensors, in codes."""
        return max((t.largest for t in self.tensors), default=0)

    @property
    def failures(self) -> tuple[str, ...]:
        """Violations of the contract; empty if there are none."""
        broken: list[str] = []
        if not self.codes + self.island_codes and not (self.logits_only and self.images):
            broken.append("no codes were compared: the networks share no tensor, or got no images")
        if self.differing >= MOST_DIFFERING * self.codes and self.differing:
            broken.append(
                f"{self.differing} of {self.codes} codes differ, the contract is fewer than 1 in "
                f"{round(1 / MOST_DIFFERING):,}"
            )
        if self.island_differing >= MOST_DIFFERING_OF_ISLANDS * self.island_codes > 0:
            broken.append(
                f"{self.island_differing} of {self.island_codes} codes that float islands make "
                f"differ, the contract is fewer than 1 in {round(1 / MOST_DIFFERING_OF_ISLANDS):,}"
            )
        if self.largest > LARGEST_DIFFERENCE:
            worst = max(self.tensors, key=lambda t: t.largest)
            broken.append(
                f"{worst.name}: a code differs by {worst.largest}, the contract is "
                f"{LARGEST_DIFFERENCE}"
            )
        flips = 0 if self.end_to_end is None else MOST_FLIPS * self.images
        if self.top1_flips > flips:
            broken.append(f"{self.top1_flips:,} of {self.images:,} images change their class")
        if self.unexplained_results and not self.logits_only:
            broken.append(
                f"{self.unexplained_results} of {self.results} results differ in images whose "
                f"codes are equal (largest difference {self.largest_result_difference:.3g}): the "
                "last layer differs"
            )
        return tuple(broken)

    def __str__(self) -> str:
        islands: list[str] = []
        if self.end_to_end is not None:
            count = self.codes + self.island_codes
            islands = [
                f"float islands: {self.island_differing:,} of {self.island_codes:,} codes that "
                f"they make differ; end to end {self.end_to_end:,} of {count:,}",
                *(
                    f"  {t.name}, made by {t.island}: {t.differing:,} of {t.codes:,}"
                    for t in self.tensors
                    if t.island and t.differing
                ),
            ]
        lines = [
            f"{self.differing:,} of {self.codes:,} codes differ; "
            f"{self.top1_flips:,} of {self.images:,} images change their class",
            *islands,
            *(f"broken contract: {failure}" for failure in self.failures),
        ]
        return "\n".join(lines)


def compare(
    expected: Network,
    actual: Network,
    graph: IntegerGraph,
    batches: Iterable[Any],
    real: Network | None = None,
    segments: Segments | None = None,
) -> Verification:
    """Run two networks on the same inputs and count the codes that differ.

    Args:
        expected: The reference.
        actual: The network to check.
        graph: Scales and zero points of the tensors.
        batches: Images, or tuples of the arguments of a model of several inputs.
        real: The float network; None leaves out SQNR.
        segments: The network to check, part by part; None if it has no float islands.
    """
    by_island = [isinstance(_maker(graph, output.name), FloatOp) for output in graph.outputs]
    end_to_end = 0
    sums: dict[str, _Sums] = {}
    results = _Results()
    images = flips = flips_fp32 = nan_inputs = 0
    logits_only = False
    for batch in each_batch(batches):
        count = next(len(x) for x in jax.tree.leaves(batch) if np.ndim(x))
        left, right = _in_shape(expected(batch), graph, count), actual(batch)
        floats = None if real is None else real(batch)
        has_differing = np.zeros(count, bool)
        parts = right if segments is None else segments(batch, left.tensors)
        for name in left.tensors.keys() & right.tensors.keys():
            codes = np.asarray(parts.tensors[name], np.int32)
            entry = sums.setdefault(name, _Sums())
            wanted = np.asarray(left.tensors[name], np.int32)
            has_differing |= entry.compare(wanted, codes)
            if segments is not None:
                end_to_end += int((wanted != np.asarray(right.tensors[name], np.int32)).sum())
            if floats is not None and name in floats.tensors:
                tensor = graph.tensors[name]
                value = (codes - tensor.zero_point) * np.float64(tensor.scale)
                entry.measure(np.asarray(floats.tensors[name], np.float64), value)
        images += count
        nan_inputs += _nans(batch)
        logits_only = not left.tensors or not right.tensors
        unseen = any(name not in left.tensors for name in graph.entries)
        has_differing |= unseen  # Perhaps in a tensor that the reference does not show.
        for network in (left, right):
            _check_results(network, graph)
        for one, other, island in zip(left.results, parts.results, by_island, strict=True):
            # An island computes from the given codes.
            unlike = has_differing & (not island or unseen)
            results.compare(np.asarray(one), np.asarray(other), unlike, island)
        flips += _flips(left.results, right.results)
        if floats is not None:
            flips_fp32 += _flips(floats.results, right.results)
    # In the order of the graph.
    of_island, islands = _after_islands(graph, sums), _made_by_islands(graph)
    checks = tuple(
        dataclasses.replace(
            sums[name].check(name), of_island=name in of_island, island=islands.get(name, "")
        )
        for name in graph.tensors
        if name in sums
    )
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
        None if segments is None else end_to_end,
    )


def _in_shape(observed: Observation, graph: IntegerGraph, batch: int) -> Observation:
    """Return codes in the graph's shapes: `jnp.matmul` drops the axis of a batch of one."""

    def shaped(name: str, codes: Any) -> Any:
        shape = (batch, *graph.tensors[name].shape) if name in graph.tensors else codes.shape
        return codes.reshape(shape) if codes.size == np.prod(shape) else codes

    tensors = {name: shaped(name, codes) for name, codes in observed.tensors.items()}
    return Observation(tensors, observed.results)


def _check_results(observed: Observation, graph: IntegerGraph) -> None:
    if len(observed.results) != len(graph.outputs):
        raise ExecutionError(
            "verify compares networks with the same results: one of them returns "
            f"{len(observed.results)} arrays, the integer network {len(graph.outputs)}."
        )


def _flips(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return how many images change their class in a result; a result of scores is a vector."""
    scores = [(np.asarray(a), np.asarray(b)) for a, b in zip(left, right, strict=True)]
    changed = [a.argmax(-1) != b.argmax(-1) for a, b in scores if a.ndim == 2 and a.shape[1]]
    return int(np.any(changed, axis=0).sum()) if changed else 0


def _made_by_islands(graph: IntegerGraph) -> dict[str, str]:
    """Return the module of the island that makes each tensor that is quantized from a real one."""
    modules = {x: island.name or "the model" for island in graph.islands for x in island.outputs}
    readers = [node for node in graph.nodes if node.output in graph.entries]
    return {node.output: modules[x] for node in readers for x in node.inputs if x in modules}


def _after_islands(graph: IntegerGraph, observed: Iterable[str]) -> set[str]:
    """Return the tensors that islands make, with all that follow from those that are not observed.

    Nothing can be given in place of those, so what follows differs with them.
    """
    unseen, made = set[str](), set(graph.entries)
    for node in graph.nodes:
        of_island = node.output in graph.entries
        if (unseen.intersection(node.inputs) and not of_island) or (
            of_island and node.output not in observed
        ):
            unseen.add(node.output)
    return made | unseen


def _maker(graph: IntegerGraph, name: str) -> Node | None:
    return next((node for node in graph.nodes if node.output == name), None)


def _nans(batch: Any) -> int:
    """Return how many values are NaN; integers are not."""
    arrays = [x for x in jax.tree.leaves(batch) if hasattr(x, "dtype")]
    floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(int(np.isnan(np.asarray(x, np.float32)).sum()) for x in floats)


@dataclasses.dataclass
class _Results:
    """Counts of the results over all batches."""

    values: int = 0
    differing: int = 0
    largest: float = 0.0
    unexplained: int = 0

    def compare(
        self, left: np.ndarray, right: np.ndarray, has_differing: np.ndarray, by_island: bool
    ) -> None:
        """Count results that differ, and those of images without a differing code apart.

        Results of a float island may differ by a rounding.
        """
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
        difference = np.abs(left.astype(np.float64) - right.astype(np.float64))
        allowed = LARGEST_RESULT_DIFFERENCE * np.abs(left).max(initial=0) if by_island else 0.0
        unlike = ~same & ~(difference <= allowed)
        self.unexplained += int(unlike[~has_differing].sum())
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
