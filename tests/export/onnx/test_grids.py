"""Sums and averages whose kernels round differently from the graph unless scales are chosen."""

import dataclasses

import numpy as np
import pytest
from integer import graphs
from references import integer_graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from jaxqat.errors import ExportError  # noqa: E402
from jaxqat.export._onnx.grids import offsets  # noqa: E402
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
        input_shape=tensors[0].shape,
        tensors={t.name: t for t in tensors},
        nodes=tuple(nodes),
        output=output,
        output_shape=tensors[-1].shape,
    )


QUANTIZE = g.Quantize(name="quantize", inputs=(), output="x", inverse=F(1))


def sum_of_two(scales, zeros, out):
    """A network that adds its two inputs, integers of -128..127 that become codes as they are."""
    x = tensor("x", (2,), 1, 0)
    nodes: list[g.Node] = [QUANTIZE]
    terms = []
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
    multipliers = (F(F(scales[0]) / out.scale), F(F(scales[1]) / out.scale))
    nodes.append(g.Add(name="add", inputs=("a", "b"), output=out.name, multipliers=multipliers))
    return network([x, *terms, out], nodes, out.name)


EVERY_PAIR = np.stack(np.meshgrid(np.arange(-128, 128), np.arange(-128, 128)), -1).reshape(-1, 2)
IRREGULAR = np.random.default_rng(0).uniform(0.2, 1.6, 4)
NEAR_TIES = [40.5 / 103, 61.5 / 97]  # 103 or 97 steps are half a step from a whole one.
TINY = 0.001  # All its steps round to 0.


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


@pytest.mark.parametrize("zeros", [(0, -128), (-3, 17)], ids=str)
@pytest.mark.parametrize("other", [1.0, TINY, *IRREGULAR, *NEAR_TIES], ids="{:.3f}".format)
@pytest.mark.parametrize("whole", [1, 2])
def test_residual_additions_are_exact_for_every_pair_of_codes(whole, other, zeros):
    out = tensor("out", (1,), 0.043, -5)
    graph = sum_of_two((whole * out.scale, F(other) * out.scale), zeros, out)
    # One rounding for both terms, which ONNX Runtime has a kernel for.
    assert "Round" not in assert_exact(graph, EVERY_PAIR.astype(F))


@pytest.mark.parametrize("factors", [(1, 0.5), (2, 1.5), (0.5, 0.5), (0.7137, 1.2291)], ids=str)
def test_sums_that_one_rounding_would_change_are_exact_for_every_pair_of_codes(factors):
    # Halves are rounded to the even neighbour of each term, not of the sum.
    out = tensor("out", (1,), 0.043, 4)
    graph = sum_of_two([F(f) * out.scale for f in factors], (3, -128), out)
    assert "Round" in assert_exact(graph, EVERY_PAIR.astype(F))


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
        node = g.Add(name="add", inputs=("x",), output="out", multipliers=(F(1 / 1.5),))
        graph = network([x, out], [QUANTIZE, node], "out")
        assert_exact(graph, np.arange(-300, 300, dtype=F)[:, None])


def test_a_border_of_zeros_is_kept_around_a_tensor_whose_bounds_leave_zero_out():
    x = tensor("x", (3, 1), 1, 0)
    high = tensor("high", (3, 1), 1, -30, low=10, high=100)
    wide = tensor("wide", (5, 1), 1, -30, low=-30, high=100)
    nodes = [
        QUANTIZE,
        g.Add(name="shift", inputs=("x",), output="high", multipliers=(F(1),)),
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
        g.Add(name="relu", inputs=("x",), output="relu", multipliers=(F(1),)),
        g.Concat(name="join", inputs=("x", "relu"), output="joined", axis=1),
    ]
    graph = network([x, relu, joined], nodes, "joined")
    assert offsets(graph) == {"x": 128, "relu": 128, "joined": 128}
    assert_exact(graph, np.random.default_rng(0).integers(-150, 150, (50, 4, 1)).astype(F))
