"""Self-test of integer products: each shape of a network, computed here and compared with NumPy.

Compilers and runtimes have computed integer products wrongly, some only for one shape on one
processor. So each shape is tested with random codes and with those that reach the largest sums, of
the smallest and the largest codes with weights of one sign, where additions in 16 bits overflow.

A *way* is one program that computes a product: the integer network, a training step, a runtime.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxqat.integer._execute.cpu import CHUNK
from jaxqat.integer._execute.executor import default_platform, make_executor
from jaxqat.integer._inputs import INPUT, Input
from jaxqat.integer._nodes.base import CODE_MAX, CODE_MIN, Tensor
from jaxqat.integer._nodes.product import Product
from jaxqat.integer._nodes.quantize import Quantize
from jaxqat.integer._numpy_products import codes, real, sums
from jaxqat.integer._results import Output
from jaxqat.integer.graph import IntegerGraph
from jaxqat.quant._numerics import cpu
from jaxqat.quant._numerics.products import Convolution, Dot

ONE = np.float32(1)
BIAS = 1000  # Its largest magnitude; small, so that sums stay in int32.


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A product of one shape.

    Attributes:
        layers: Names of the layers of this shape.
        node: The product; its multiplier spreads the sums over the codes.
        source: The tensor that it reads.
        out: The tensor that it makes; None if it makes real numbers.
        units: Input, codes less the zero point, (batch, *shape).
    """

    layers: tuple[str, ...]
    node: Product
    source: Tensor
    out: Tensor | None
    units: np.ndarray

    @property
    def shape(self) -> str:
        """The shape in words, such as '3x3 conv, 16 to 32 channels, stride 2, on 8x8'."""
        node, (*spatial, channels) = self.node, self.source.shape
        window = f"{_by(node.window)} conv" if node.kind == "conv" else "dense"
        extras = {"stride": node.strides, "dilation": node.dilation, "groups": (node.groups,)}
        more = [
            f"{name} {_by(sizes if len(set(sizes)) > 1 else sizes[:1])}"
            for name, sizes in extras.items()
            if set(sizes) - {1}
        ]
        where = [f"on {_by(spatial)}"] if spatial else []
        return ", ".join([window, f"{channels} to {node.channels} channels", *more, *where])

    @functools.cached_property
    def total(self) -> np.ndarray:
        """The sums by NumPy, without the bias."""
        return sums(self.node, self.units)

    def graph(self, *, requantized: bool) -> IntegerGraph:
        """Return a network of this product alone, with float input.

        Args:
            requantized: Whether its result is codes, or the sums as they are in float32.
        """
        node = self.node
        if not requantized:
            ones = np.ones(node.channels, np.float32)
            node = dataclasses.replace(node, multiplier=ones, weight_scale=ones)
        made = {self.out.name: self.out} if requantized and self.out is not None else {}
        shape = node.output_shape([self.source.shape])
        return IntegerGraph(
            inputs=(Input(shape=self.source.shape),),
            tensors={self.source.name: self.source, **made},
            nodes=(
                Quantize(name="input", inputs=(INPUT,), output=self.source.name, inverse=ONE),
                node,
            ),
            outputs=(Output(name=node.output, shape=shape),),
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Computed:
    """What a way computes.

    Attributes:
        pairs: What NumPy computes, and what the way does.
        program: The compiled program as text; empty if it is unknown.
    """

    pairs: Sequence[tuple[Any, Any]]
    program: str = ""


Way = Callable[[Case], Computed]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCheck:
    """A product of one shape, computed in one way and compared with NumPy.

    Attributes:
        way: Name of the way.
        shape: The shape in words.
        layers: Names of the layers of this shape.
        values: Number of sums and codes that were compared.
        differing: Number of them that differ.
        largest: Largest difference.
        error: Why it could not be computed; empty if it could.
        program: The compiled program as text; empty if it is unknown.
    """

    way: str
    shape: str
    layers: tuple[str, ...]
    values: int = 0
    differing: int = 0
    largest: float = 0.0
    error: str = ""
    program: str = dataclasses.field(default="", repr=False)


def check(case: Case, name: str, way: Way) -> ProductCheck:
    """Compute a product in a way and compare it with NumPy; what cannot run is an error in it."""
    named = ProductCheck(way=name, shape=case.shape, layers=case.layers)
    try:
        found = way(case)
        differences = [_difference(expected, actual) for expected, actual in found.pairs]
    except Exception as error:  # Whatever a compiler or a runtime raises is what is looked for.
        reason = str(error).strip().partition("\n")[0]
        return dataclasses.replace(named, error=f"{type(error).__name__}: {reason}")
    return dataclasses.replace(
        named,
        values=sum(x.size for x in differences),
        differing=sum(int((x != 0).sum()) for x in differences),
        largest=max(float(x.max(initial=0)) for x in differences),
        program=found.program,
    )


def _difference(expected: Any, actual: Any) -> np.ndarray:
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if expected.shape != actual.shape:
        raise ValueError(f"the result has the shape {actual.shape}, not {expected.shape}")
    if not np.isfinite(actual).all():
        raise ValueError("the result holds numbers that are not finite")
    return np.abs(expected - actual)


def integer_network(case: Case) -> Computed:
    """Compute sums and codes as the integer network does on the present device."""
    images = case.units.astype(np.float32)
    executor = make_executor(case.graph(requantized=False))
    options: Any = executor.compiler_options
    jitted = jax.jit(executor.apply, compiler_options=options)
    compiled = jitted.lower(executor.parameters, images).compile()
    total = case.total
    unit = dataclasses.replace(case.node, multiplier=np.ones(case.node.channels, np.float32))
    pairs: list[tuple[Any, Any]] = [(real(unit, total), compiled(executor.parameters, images))]
    if case.out is not None:
        network = make_executor(case.graph(requantized=True))
        pairs.append((codes(case.node, total, case.out), network.codes(images)[case.out.name]))
    return Computed(pairs=pairs, program=compiled.as_text() or "")


def training(case: Case) -> Computed:
    """Compute the sums as training does."""
    return _training(case)


def fast_training(case: Case) -> Computed:
    """Compute the sums as training does in the form of `jaxqat.jit_step`."""
    with cpu.form():
        return _training(case, dict(cpu.OPTIONS))


def _training(case: Case, options: Any = None) -> Computed:
    values = (case.units + case.source.zero_point).astype(np.int8)
    product = _traced(case.node, values)
    jitted = jax.jit(product.accumulate)
    compiled = jitted.lower(values, case.node.weights).compile(compiler_options=options)
    result = compiled(values, case.node.weights)
    return Computed(pairs=[(sums(case.node, values), result)], program=compiled.as_text() or "")


def _traced(node: Product, values: np.ndarray) -> Convolution | Dot:
    """Return a product as training knows it."""
    if node.kind == "dense":
        numbers = (((values.ndim - 1,), (0,)), ((), ()))
        return Dot(None, {"dimension_numbers": numbers}, values.ndim, 1)
    spatial = "DHW"[3 - (values.ndim - 2) :]
    layout = f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
    params = {
        "window_strides": node.strides,
        "padding": node.padding,
        "lhs_dilation": (1,) * len(spatial),
        "rhs_dilation": node.dilation,
        "dimension_numbers": lax.conv_dimension_numbers(values.shape, node.weights.shape, layout),
        "feature_group_count": node.groups,
    }
    return Convolution(None, params, values.ndim)


def jax_ways() -> dict[str, Way]:
    """Return the ways in which JAX computes products on the present device, by name."""
    platform = default_platform()
    ways: dict[str, Way] = {"integer network": integer_network, "training": training}
    if platform == "cpu":
        ways["fast training"] = fast_training
    return ways


def cases_of(graph: IntegerGraph, *, seed: int = 0) -> list[Case]:
    """Return a case for each shape of a network's products, in order."""
    found: dict[Any, tuple[Product, list[str]]] = {}
    for node in graph.products():
        source = graph.tensors[node.inputs[0]]
        geometry = node.strides, node.padding, node.dilation, node.groups
        # Executors distinguish codes that are never negative, and a zero point below all others.
        grid = source.low >= 0, source.low == source.zero_point, node.output in graph.tensors
        key = (node.kind, node.weights.shape, node.weight_bits, source.shape, *geometry, *grid)
        found.setdefault(key, (node, []))[1].append(node.name)
    rng = np.random.default_rng(seed)
    return [
        _case(node, layers, graph.tensors[node.inputs[0]], graph.tensors.get(node.output), rng)
        for node, layers in found.values()
    ]


def _case(
    node: Product,
    layers: Sequence[str],
    source: Tensor,
    out: Tensor | None,
    rng: np.random.Generator,
) -> Case:
    low, high = source.low - source.zero_point, source.high - source.zero_point
    units = rng.integers(low, high + 1, (CHUNK, *source.shape))
    units[0], units[1] = low, high
    source = dataclasses.replace(source, name="input", scale=ONE)
    if out is not None:
        out = dataclasses.replace(out, name="output", scale=ONE)
    limit = 2 ** (node.weight_bits - 1) - 1
    weights = rng.integers(-limit, limit + 1, node.weights.shape)
    weights[..., 0] = limit
    weights[..., 1:2] = -limit
    # With more inputs than fit int32 at their largest, the rest gets no weight.
    fitting = (np.iinfo(np.int32).max - BIAS) // (limit * (CODE_MAX - CODE_MIN))
    weights.reshape(-1, node.channels)[fitting:] = 0
    node = dataclasses.replace(
        node,
        name="product",
        inputs=("input",),
        output="sums" if out is None else "output",
        weights=weights.astype(np.int8),
        bias=rng.integers(-BIAS, BIAS, node.channels).astype(np.int32),
    )
    largest = np.abs(sums(node, units)).max(tuple(range(units.ndim - 1)))
    spread = rng.uniform(0.5, 2, node.channels) * CODE_MAX / np.maximum(largest, 1)
    multiplier = spread.astype(np.float32)
    node = dataclasses.replace(node, multiplier=multiplier, weight_scale=multiplier)
    return Case(layers=tuple(layers), node=node, source=source, out=out, units=units)


# Kind, shape of one input, shape of the weights, stride, groups: small, with few and with many
# channels, as compilers choose other kernels for each.
_SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...], int, int], ...] = (
    ((16, 16, 3), (3, 3, 3, 16), 1, 1),
    ((16, 16, 16), (3, 3, 16, 16), 1, 1),
    ((16, 16, 16), (3, 3, 16, 32), 2, 1),
    ((16, 16, 16), (1, 1, 16, 32), 2, 1),
    ((8, 8, 64), (3, 3, 64, 64), 1, 1),
    ((4, 4, 512), (3, 3, 512, 64), 1, 1),
    ((8, 8, 32), (3, 3, 1, 32), 1, 32),
    ((8, 8, 32), (3, 3, 8, 32), 1, 4),
    ((64,), (64, 10), 1, 1),
    ((512,), (512, 256), 1, 1),
)


def built_in_cases(*, seed: int = 0) -> list[Case]:
    """Return a small set of shapes, as networks for images have them."""
    rng = np.random.default_rng(seed)
    return [_built_in(number, *shape, rng) for number, shape in enumerate(_SHAPES)]


def _built_in(
    number: int,
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    stride: int,
    groups: int,
    rng: np.random.Generator,
) -> Case:
    rank, channels = len(shape) - 1, weights[-1]
    pad = tuple(((size - 1) // 2, (size - 1) // 2) for size in weights[:rank])
    zero = (CODE_MIN, -3)[number % 2]  # As behind a ReLU, and as elsewhere.
    node = Product(
        name="",
        inputs=(),
        output="",
        kind="conv" if rank else "dense",
        weights=np.zeros(weights, np.int8),
        bias=np.zeros(channels, np.int32),
        multiplier=np.ones(channels, np.float32),
        weight_scale=np.ones(channels, np.float32),
        strides=(stride,) * rank,
        padding=pad,
        dilation=(1,) * rank,
        groups=groups,
    )
    source = Tensor(name="", shape=shape, scale=ONE, zero_point=zero)
    made = node.output_shape([shape])
    out = Tensor(name="", shape=made, scale=ONE, zero_point=-3) if number != 8 else None
    return _case(node, (), source, out, rng)


def _by(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
