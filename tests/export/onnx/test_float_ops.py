"""Float operations in ONNX Runtime give the numbers of JAX, and integer parts its codes."""

import dataclasses

import numpy as np
import pytest
from integer import float_cases, graphs
from integer.float_cases import BATCH, CASES, N

import jaxqat
from jaxqat.errors import ExportError
from jaxqat.integer import graph as g
from jaxqat.integer._nodes.float_op import OPERATIONS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from jaxqat.export._onnx.float_ops import _DIRECT, _WRITERS  # noqa: E402
from jaxqat.export._onnx.model import onnx_model  # noqa: E402
from jaxqat.export._onnx.runtime import make_runner, run_onnx  # noqa: E402

# What has no operator in ONNX, and the reason that is told.
REFUSED = {
    "cbrt": "ONNX has no operator for it",
    "atan2": "ONNX has no operator for it",
    "cumprod": "ONNX has no operator for it",
    "cummax": "ONNX has no operator for it",
    "cummin": "ONNX has no operator for it",
    "cumlogsumexp": "ONNX has no operator for it",
    "window_min": "ONNX has no operator for it",
    "pad inside": "it pads between elements",
}
MORE = "reshape to more examples"  # Its result can be no network's.
READ = {name: case for name, case in CASES.items() if case.reads and name != MORE}


@pytest.mark.parametrize("name", sorted(READ.keys() - REFUSED.keys()))
@pytest.mark.parametrize("opset", [17, 18])
def test_an_operation_gives_the_numbers_of_jax_for_any_batch(name, opset):
    case = CASES[name]
    graph = case.graph()
    model = onnx_model(graph, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    x = case.input()
    for count in (N, 1):
        found, _ = run_onnx(model.SerializeToString(), x[:count])
        wanted = np.asarray(jaxqat.make_executor(graph, platform="tpu")(x[:count]))
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        if case.dtype == "float32":
            # Both are some roundings of float32 from the exact number.
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_has_no_operator_for_is_refused_by_name(name):
    operation = CASES[name].operation
    match = f"node 'op': the float operation '{operation}' cannot be written to ONNX: "
    with pytest.raises(ExportError, match=match + REFUSED[name]):
        onnx_model(CASES[name].graph())


def test_every_operation_has_a_writer_or_is_refused():
    assert not _DIRECT.keys() & _WRITERS.keys()
    refused = {CASES[name].operation for name, why in REFUSED.items() if "no operator" in why}
    # Positions are constants, unless they count the examples of a batch.
    assert _DIRECT.keys() | _WRITERS.keys() | refused | {"iota"} == OPERATIONS.keys()
    assert not (_DIRECT.keys() | _WRITERS.keys()) & (refused | {"iota"})


def node(name, kind, inputs, shape, attributes, constants, dtype="float32"):
    return g.FloatOp(
        name=name, inputs=inputs, output=name, operation=kind, attributes=attributes,
        constants=constants, shape=shape, dtype=dtype,
    )  # fmt: skip


def test_a_batch_may_be_part_of_an_axis():
    x, first = CASES[MORE].input(), CASES[MORE].node()
    back = node("back", "reshape", ("result",), [BATCH, 20], {"shape": [BATCH, 20]}, (None,))
    graph = g.IntegerGraph(
        inputs=(g.Input(shape=(4, 5)),),
        tensors={},
        nodes=(first, back),
        outputs=(g.Output(name="back", shape=(20,)),),
    )
    found, _ = run_onnx(onnx_model(graph).SerializeToString(), x)
    np.testing.assert_array_equal(found, x.reshape(N, 20))
    np.testing.assert_array_equal(jaxqat.make_executor(graph)(x), x.reshape(N, 20))


@pytest.mark.parametrize("operation", ["reduce_and", "reduce_or"])
def test_reductions_of_masks_give_those_of_jax(operation):
    graph = g.IntegerGraph(
        inputs=(g.Input(shape=(4, 2)),), tensors={}, outputs=(g.Output(name="any", shape=(2,)),),
        nodes=(
            node("mask", "gt", (g.INPUT,), [BATCH, 4, 2], {}, (None, np.array(0.5, "f")), "bool"),
            node("any", operation, ("mask",), [BATCH, 2], {"axes": [1]}, (None,), "bool"),
        ),
    )  # fmt: skip
    x = np.random.default_rng(0).normal(0.8, 1, (20, 4, 2)).astype(np.float32)
    for opset in (17, 18):
        found, _ = run_onnx(onnx_model(graph, opset=opset).SerializeToString(), x)
        wanted = np.asarray(jaxqat.make_executor(graph)(x))
        assert 0 < wanted.mean() < 1
        np.testing.assert_array_equal(found, wanted)


def test_each_integer_part_has_the_codes_of_jax_in_onnx_runtime():
    graph = float_cases.island()
    pixels = graphs.pixels(graph, 9)
    executor = jaxqat.make_executor(graph)
    codes = executor.codes(pixels)
    model = onnx_model(graph, input="uint8", by_segment=True)
    onnx.checker.check_model(model, full_check=True)
    result, found = make_runner(model.SerializeToString(), expose=True)(pixels, codes)
    assert found.keys() == codes.keys()
    for name, wanted in codes.items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    np.testing.assert_allclose(result, executor(pixels), rtol=1e-5)


def test_a_whole_file_with_islands_differs_by_single_codes_at_most():
    graph = float_cases.island()
    pixels = graphs.pixels(graph, 40)
    codes = jaxqat.make_executor(graph).codes(pixels)
    _, found = run_onnx(onnx_model(graph, input="uint8").SerializeToString(), pixels, expose=True)
    made = np.abs(found["swish/codes"].astype(int) - np.asarray(codes["swish/codes"], int))
    assert made.max() <= 1 and made.mean() < 5e-3


def test_bfloat16_operations_are_refused_by_name():
    graph = float_cases.island()
    nodes = [
        dataclasses.replace(node, dtype="bfloat16") if node.name == "exp" else node
        for node in graph.nodes
    ]
    with pytest.raises(ExportError, match=r"node 'exp': .* it computes in bfloat16"):
        onnx_model(dataclasses.replace(graph, nodes=tuple(nodes)))
