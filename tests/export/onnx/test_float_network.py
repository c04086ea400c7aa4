"""The float32 network of an integer network, against float64 NumPy."""

import numpy as np
import pytest
from integer import graphs
from references import integer_graph

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from jaxqat.errors import ExportError  # noqa: E402
from jaxqat.export._onnx.float_network import float_model  # noqa: E402
from jaxqat.integer import graph as g  # noqa: E402


def real_values(graph, images):
    """Return the result in float64, with every tensor in units of its grid and never rounded."""
    units, tensors = {graph.input.name: images.astype(np.float64)}, graph.tensors
    for node in graph.nodes:
        out = tensors.get(node.output)
        inputs = [units[name] for name in node.inputs]
        match node:
            case g.Quantize():
                real = inputs[0]
                if node.factors is not None:
                    real = (real + node.shifts) * node.factors + node.terms
                units[node.output] = real / out.scale
                continue
            case g.Product():
                value = integer_graph.product(node, inputs[0]) + node.bias
                value = value * node.multiplier.astype(np.float64)
            case g.Add():
                value = sum(
                    x * np.float64(m) for x, m in zip(inputs, node.multipliers, strict=True)
                )
            case g.MatMul():
                value = integer_graph.paired(node, *inputs) * np.float64(node.multiplier)
            case g.Affine():
                value = (inputs[0] * node.weights + node.bias) * node.multiplier.astype(np.float64)
            case g.Requantize():
                value = inputs[0] * np.float64(node.multiplier)
            case g.SumPool():
                axes = tuple(range(1, 1 + len(node.window)))
                value = integer_graph.windows(inputs[0], node, fill=0).sum(0)
                value = value * np.float64(node.multiplier)
                value = value.squeeze(axes) if node.drop_axes else value
            case _:
                units[node.output] = moved(node, tensors, inputs)
                continue
        if out is not None:
            low = out.low - out.zero_point if out.low == out.zero_point else -np.inf
            high = out.high - out.zero_point if out.high < 127 else np.inf
            value = np.clip(value, low, high)
        units[node.output] = value
    out = tensors.get(graph.output.name)
    return units[graph.output.name] * (1 if out is None else np.float64(out.scale))


def moved(node, tensors, inputs):
    match node:
        case g.MaxPool():
            return integer_graph.windows(inputs[0], node, fill=-1e9).max(0)
        case g.Concat():
            return np.concatenate(inputs, node.axis)
        case g.Move():
            return integer_graph.moved(node, inputs[0])
    raise TypeError(node)


@pytest.mark.parametrize("symmetric", [False, True], ids=["int8", "int8_symmetric"])
@pytest.mark.parametrize("case", [case for case in graphs.CASES if case != "gated"])
def test_the_float_network_is_the_unrounded_integer_network(case, symmetric):
    graph = graphs.build(case, symmetric=symmetric)
    images = graphs.normalized(graphs.pixels(graph, 4))
    model = float_model(graph)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"images": images})
    exact = real_values(graph, images)
    # Sums of up to 300 float32 products in each of up to 10 layers: 10 * sqrt(300) * 2**-24 is
    # 1e-5 of the largest result; cancellation within a layer costs another factor of ten.
    np.testing.assert_allclose(result, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


def test_weights_are_float32_and_the_batch_may_have_any_size():
    graph = graphs.build("residual")
    model = float_model(graph)
    types = {i.name: i.data_type for i in model.graph.initializer}
    assert all(types[f"{p.name}/weights"] == onnx.TensorProto.FLOAT for p in graph.products())
    assert not {"QuantizeLinear", "DequantizeLinear"} & {n.op_type for n in model.graph.node}
    images = graphs.normalized(graphs.pixels(graph, 5))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for n in (1, 5):
        assert session.run(None, {"images": images[:n]})[0].shape == (n, 5)


def test_a_network_with_tables_has_no_float_network():
    message = "'swish': a float network with tables is not written"
    with pytest.raises(ExportError, match=message):
        float_model(graphs.build("gated"))
