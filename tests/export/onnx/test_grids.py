"""Sums and averages whose kernels round differently from the graph unless scales are chosen."""

import dataclasses

import numpy as np
import pytest
from integer import graphs
from references import integer_graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from export.onnx.fused import optimized  # noqa: E402

from jaxqat.errors import ExportError  # noqa: E402
from jaxqat.export._onnx.grids import offsets, sum_scales  # noqa: E402
from jaxqat.export._onnx.model import onnx_model  # noqa: E402
from jaxqat.export._onnx.runtime import run_onnx  # noqa: E402
from jaxqat.integer import graph as g  # noqa: E402

F = np.float32
ANY_CODE = {"low": -128, "high": 127}


def tensor(name, shape, scale, zero_point, **bounds):
    bounds = ANY_CODE | bounds
    return g.Tensor(name=name, shape=shape, scale=F(scale), zero_point=zero_point, **bounds)


def network(tensors, nodes, output):
    return g.IntegerGraph(
        inputs=(g.Input(shape=tensors[0].shape),),
        tensors={t.name: t for t in tensors},
        nodes=tuple(nodes),
        outputs=(g.Output(name=output, shape=tensors[-1].shape),),
    )


QUANTIZE = g.Quantize(name="quantize", inputs=(g.INPUT,), output="x", inverse=F(1))


def sum_of_two(factors, shift, zeros, out):
    """A network that adds its two inputs, integers of -128..127 that become codes as they are."""
    x = tensor("x", (2,), 1, 0)
    nodes: list[g.Node] = [QUANTIZE]
    terms = []
    scales = [factor / 2**shift * float(out.scale) for factor in factors]
    for i, (name, scale, zero) in enumerate(zip("ab", scales, zeros, strict=True)):
        weights = np.zeros((2, 1), np.int8)
        weights[i] = 1
        bias, one = np.array([-zero], np.int32), np.ones(1, F)
        nodes.append(
            g.Product(
                name=name, inputs=("x",), output=name, kind="dense", weights=weights, bias=bias,
                multiplier=one, weight_scale=one * F(scale),
            )
        )  # fmt: skip
        terms.append(tensor(name, (1,), scale, zero))
    nodes.append(
        g.Add(name="add", inputs=("a", "b"), output=out.name, factors=factors, shift=shift)
    )
    return network([x, *terms, out], nodes, out.name)


EVERY_PAIR = np.stack(np.meshgrid(np.arange(-128, 128), np.arange(-128, 128)), -1).reshape(-1, 2)
# Factors over 2**shift: random ones, halves with many ties, one that vanishes, whole numbers.
SUMS = [
    *((tuple(map(int, f)), 14) for f in np.random.default_rng(0).integers(500, 24_000, (6, 2))),
    *(((1, 1), 1), ((1, 3), 1), ((3, 5), 2), ((2**14 - 1, 2**14 + 1), 14)),
    *(((1, 2**15 - 3), 14), ((1, 2), 0), ((40, 1), 0), ((61_001, 3), 12)),
]


def assert_exact(graph, images):
    """The model is exact on these images; returns its operations."""
    model = onnx_model(graph)
    onnx.checker.check_model(model, full_check=True)
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert all((array > 0).all() for name, array in arrays.items() if "scale" in name)
    result, codes = run_onnx(model.SerializeToString(), images, batch_size=len(images), expose=True)
    expected_codes, expected = integer_graph.run(graph, images)
    for name, wanted in expected_codes.items():
        np.testing.assert_array_equal(codes[name], wanted, err_msg=name)
    np.testing.assert_array_equal(result, expected)
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("zeros", [(0, -128, 3), (-3, 17, -5), (127, 5, -128)], ids=str)
@pytest.mark.parametrize(("factors", "shift"), SUMS, ids=str)
def test_sums_are_one_kernel_and_exact_for_every_pair_of_codes(factors, shift, zeros, tmp_path):
    *terms, zero = zeros
    for scale in (0.043, 0.7137, 1.5):
        # An odd smallest code: the offset to uint8 has to be even, or ties go the other way.
        out = tensor("out", (1,), scale, zero, low=-127 if zero != -128 else -128)
        graph = sum_of_two(factors, shift, terms, out)
        assert_exact(graph, EVERY_PAIR.astype(F))
        assert optimized(onnx_model(graph), tmp_path)["QLinearAdd"] == 1


# Sums without scales near the tensors' own; found among 20,000 random ones.
WITHOUT_NEAR = [("0x1.7bf1ep-7", (8617, 32761), 11), ("0x1.44ef8ep-1", (8182, 5105), 15)]


@pytest.mark.parametrize(("scale", "factors", "shift"), WITHOUT_NEAR)
def test_sums_without_scales_near_their_own_are_exact_in_units(scale, factors, shift, tmp_path):
    out = tensor("out", (1,), float.fromhex(scale), 5)
    graph = sum_of_two(factors, shift, (3, -128), out)
    node = next(n for n in graph.nodes if isinstance(n, g.Add))
    assert sum_scales(node, out.scale).out == 1
    assert_exact(graph, EVERY_PAIR.astype(F))
    assert optimized(onnx_model(graph), tmp_path)["QLinearAdd"] == 1


def test_scales_of_a_sum_give_its_multipliers_to_the_bit():
    rng = np.random.default_rng(1)
    for _ in range(500):
        factors = tuple(map(int, rng.integers(1, 24_000, 2)))
        scale = F(np.exp(rng.uniform(-9, 3)))
        node = g.Add(name="add", inputs=("a", "b"), output="out", factors=factors, shift=14)
        found = sum_scales(node, scale)
        for term, factor in zip(found.terms, factors, strict=True):
            assert term / found.out == F(factor / 2**14)
        # At most 64 units in the last place from the scale, which are 2**-23 of it or less.
        assert abs(float(found.out) / float(scale) - 1) <= 64 * 2**-23 or found.out == 1


def average(length, out_scale):
    """A network that averages integers of -128..127 along its only axis."""
    x = tensor("x", (length, 1), 1, 0)
    out = tensor("out", (1,), out_scale, -7)
    node = g.SumPool(
        name="mean", inputs=("x",), output="out", window=(length,), strides=(1,),
        padding=((0, 0),), drop_axes=True, multiplier=F(F(1 / length) / out.scale),
    )  # fmt: skip
    return network([x, out], [QUANTIZE, node], "out")


def test_global_averages_are_exact_whatever_their_area():
    forms = []
    for length in (1, 3, 7, 12, 16, 49, 64):
        for out_scale in (0.013, 0.37, 0.71):
            rng = np.random.default_rng(length)
            codes = np.clip(rng.normal(0, 60, (4000, length, 1)), -128, 127).round().astype(F)
            forms.append("ReduceSum" in assert_exact(average(length, out_scale), codes))
    # Both forms are needed: not every multiplier is a quotient of a scale by (scale * area).
    assert any(forms)
    assert not all(forms)


def test_a_multiplier_in_another_rounding_is_kept_or_named():
    graph = graphs.build("mlp")
    images = graphs.normalized(graphs.pixels(graph, 64))
    products = [n for n in graph.nodes if isinstance(n, g.Product)]
    kept = 0
    for channel in range(products[1].channels - 1):
        multiplier = products[1].multiplier.copy()
        multiplier[channel] = np.nextafter(multiplier[channel], F(0))
        node = dataclasses.replace(products[1], multiplier=multiplier)
        nodes = [node if n is products[1] else n for n in graph.nodes]
        try:
            assert_exact(dataclasses.replace(graph, nodes=tuple(nodes)), images)
            kept += 1
        except ExportError as error:
            assert "node 'dense2': its multipliers" in str(error)
    assert 0 < kept < products[1].channels - 1


def test_bounds_that_uint8_does_not_have_are_kept():
    for low, high, zero in ((-20, 90, -20), (10, 100, -30), (-128, 60, 100), (-127, 127, 0)):
        x = tensor("x", (1,), 1, 0)
        out = tensor("out", (1,), 1.5, zero, low=low, high=high)
        node = g.Requantize(name="to", inputs=("x",), output="out", multiplier=F(1 / 1.5))
        graph = network([x, out], [QUANTIZE, node], "out")
        assert_exact(graph, np.arange(-300, 300, dtype=F)[:, None])


def test_a_border_of_zeros_is_kept_around_a_tensor_whose_bounds_leave_zero_out():
    x = tensor("x", (3, 1), 1, 0)
    high = tensor("high", (3, 1), 1, -30, low=10, high=100)
    wide = tensor("wide", (5, 1), 1, -30, low=-30, high=100)
    nodes = [
        QUANTIZE,
        g.Requantize(name="shift", inputs=("x",), output="high", multiplier=F(1)),
        g.Move(
            name="pad",
            kind="pad",
            inputs=("high",),
            output="wide",
            padding=((0, 0), (1, 1), (0, 0)),
        ),
    ]
    graph = network([x, high, wide], nodes, "wide")
    assert_exact(graph, np.random.default_rng(0).integers(-128, 128, (9, 3, 1)).astype(F))


def test_tensors_among_which_codes_move_share_their_offset():
    x = tensor("x", (4, 1), 1, -20, low=-128)
    relu = tensor("relu", (4, 1), 1, -20, low=-20)
    joined = tensor("joined", (8, 1), 1, -20)
    nodes = [
        QUANTIZE,
        g.Requantize(name="relu", inputs=("x",), output="relu", multiplier=F(1)),
        g.Concat(name="join", inputs=("x", "relu"), output="joined", axis=1),
    ]
    graph = network([x, relu, joined], nodes, "joined")
    assert offsets(graph) == {"x": 128, "relu": 128, "joined": 128}
    assert_exact(graph, np.random.default_rng(0).integers(-150, 150, (50, 4, 1)).astype(F))
