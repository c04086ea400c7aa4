"""Exported ONNX files in ONNX Runtime: codes, results and kernels."""

import dataclasses
import json

import numpy as np
import pytest
from integer import graphs
from references import integer_graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from export.onnx.fused import optimized  # noqa: E402

from jaxqat.errors import ExportError  # noqa: E402
from jaxqat.export._onnx.model import onnx_model  # noqa: E402
from jaxqat.export._onnx.runtime import run_onnx, with_codes  # noqa: E402
from jaxqat.integer import graph as g  # noqa: E402

RECIPES = {"int8": {}, "int8_symmetric": {"symmetric": True}, "int4": {"bits": 4}}
BY_RECIPE = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
BY_CASE = pytest.mark.parametrize("case", graphs.CASES)


def run(graph, images, **options):
    form = "uint8" if images.dtype == np.uint8 else "float"
    content = onnx_model(graph, input=form).SerializeToString()
    return run_onnx(content, images, expose=True, **options)


def assert_equal(graph, images, **options):
    result, codes = run(graph, images, **options)
    expected_codes, expected = integer_graph.run(graph, images)
    assert codes.keys() == expected_codes.keys()
    for name, wanted in expected_codes.items():
        np.testing.assert_array_equal(codes[name], wanted, err_msg=name)
    np.testing.assert_array_equal(result, expected)
    return codes


@BY_RECIPE
@BY_CASE
def test_all_codes_and_results_equal_the_integer_network(case, recipe):
    graph = graphs.build(case, **recipe)
    pixels = graphs.pixels(graph, 6)
    codes = assert_equal(graph, graphs.normalized(pixels))
    assert_equal(graph, pixels)
    # The comparison is meaningful only if codes vary.
    assert all(len(np.unique(c)) > (2 if recipe.get("bits") else 12) for c in codes.values())


@pytest.mark.parametrize("seed", range(5))
def test_residual_networks_are_exact_with_other_weights(seed):
    graph = graphs.build("residual", seed=seed)
    assert_equal(graph, graphs.normalized(graphs.pixels(graph, 4, seed)))


@BY_RECIPE
def test_a_nan_in_a_float_input_gets_the_code_of_zero(recipe):
    graph = graphs.build("residual", **recipe)
    images = graphs.normalized(graphs.pixels(graph, 3))
    images[1, 2, 3] = np.nan
    codes = assert_equal(graph, images)
    name = graph.quantize.output
    assert (codes[name][1, 2, 3] == graph.tensors[name].zero_point).all()


@BY_RECIPE
@BY_CASE
def test_every_product_is_an_integer_kernel(case, recipe, tmp_path):
    graph = graphs.build(case, **recipe)
    model = onnx_model(graph)
    counts = optimized(model, tmp_path)
    spatial = [len(graph.tensors[p.inputs[0]].shape) > 1 for p in graph.products()]
    pools = sum(isinstance(n, g.SumPool) and not n.drop_axes for n in graph.nodes)
    assert counts["QLinearConv"] == sum(spatial) + pools
    assert counts["QGemm"] == len(spatial) - sum(spatial)
    assert counts["MatMulInteger"] == sum(isinstance(n, g.MatMul) for n in graph.nodes)
    assert not {"Conv", "Gemm", "MatMul", "AveragePool"} & counts.keys()
    # The only additions find a channel's table, or are of the network's own constants.
    by_channel = (n for n in graph.nodes if isinstance(n, g.Table) and n.table.ndim == 2)
    constants = (n for n in graph.nodes if isinstance(n, g.Affine | g.Quantize))
    scaled = sum(1 if isinstance(n, g.Affine) else 2 * bool(n.coefficients) for n in constants)
    assert counts["Add"] == len([*by_channel]) + scaled
    assert counts["QLinearAdd"] == sum(isinstance(n, g.Add) for n in graph.nodes)
    # Codes as outputs change no kernel; each only needs a transposition if it is NHWC internally.
    exposed = optimized(with_codes(model), tmp_path)
    layout = {"Transpose", "MaxPool", "NhwcMaxPool"}
    if any(
        isinstance(n, g.Multiply | g.MatMul | g.Affine) for n in graph.nodes
    ):  # It is no fused kernel.
        layout |= {"QuantizeLinear", "DequantizeLinear"}
    assert {k: n for k, n in counts.items() if k not in layout} == {
        k: n for k, n in exposed.items() if k not in layout
    }


def test_the_input_layout_costs_no_transposition(tmp_path):
    graph = graphs.build("chain")
    assert "Transpose" not in optimized(onnx_model(graph), tmp_path)


def test_models_load_with_exact_products_for_processors_without_vnni(tmp_path):
    # The option makes ONNX Runtime rewrite int8 weights, which fails for shared arrays.
    counts = optimized(onnx_model(graphs.build("residual")), tmp_path, x64quantprecision="1")
    assert counts["QLinearConv"] == 6


def test_the_batch_may_have_any_size():
    graph = graphs.build("residual")
    images = graphs.normalized(graphs.pixels(graph, 5))
    whole, codes = run(graph, images)
    parts, codes_of_parts = run(graph, images, batch_size=2)  # 2, 2 and 1.
    np.testing.assert_array_equal(whole, parts)
    for name in codes:
        np.testing.assert_array_equal(codes[name], codes_of_parts[name])


@BY_CASE
def test_files_pass_the_full_check(case):
    graph = graphs.build(case)
    for form in ("float", "uint8"):
        model = onnx_model(graph, input=form)
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import[0].version == 17
        (image,), (result,) = model.graph.input, model.graph.output
        batch, *shape = image.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert [d.dim_value for d in shape] == list(graph.input_shape)
        assert [d.dim_value for d in result.type.tensor_type.shape.dim[1:]] == [*graph.output_shape]


@pytest.mark.parametrize("opset", [13, 15, 18, 21])
def test_other_opsets_give_the_same_codes(opset):
    graph = graphs.build("depthwise", symmetric=True)
    images = graphs.normalized(graphs.pixels(graph, 2))
    model = onnx_model(graph, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    result, _ = run_onnx(model.SerializeToString(), images)
    np.testing.assert_array_equal(result, integer_graph.run(graph, images)[1])


def test_metadata_holds_labels_origin_input_and_codes():
    graph = graphs.build("chain")
    model = onnx_model(graph, input="uint8")
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["labels"]) == [f"class {i}" for i in range(5)]
    assert json.loads(told["metadata"]) == {"origin": "a test"}
    assert json.loads(told["input"])["layout"] == ["batch", "space0", "space1", "channel"]
    assert json.loads(told["codes"]).keys() == graph.tensors.keys()
    assert model.producer_name == "jaxqat"


def test_weights_are_one_byte_each():
    graph = graphs.resnet18(8, 8)
    size = len(onnx_model(graph).SerializeToString())
    weights = sum(p.weights.size for p in graph.products())
    channels = sum(p.channels for p in graph.products())
    # A channel has an int32 bias with scale and zero point (12 bytes), and scale and zero point of
    # its weights (5); nodes and names take 1.5 kB per node. At width 64: 11.29 MB.
    assert size < weights + 17 * channels + 1500 * len(graph.nodes)


def real_result(m, x, *, pool):
    """Return a network that ends in a convolution or an average pool, not in a dense layer."""
    if pool:
        tensor = m.tensors[x]
        window, factor = tensor.shape[:-1], np.float32(1 / np.prod(tensor.shape[:-1]))
        m.emit(
            g.SumPool(
                name="mean", inputs=(x,), output="logits", window=window, strides=window,
                padding=((0, 0),) * len(window), drop_axes=pool == "global",
                multiplier=tensor.scale * factor,
            ),
            None,
        )  # fmt: skip
    else:
        m.requantized(m.conv_values("last", x, 4)[0], None, output="logits")
    return m.finish()


@pytest.mark.parametrize("pool", [None, "windows", "global"])
def test_real_results_of_convolutions_and_pools_are_exact(pool):
    m = graphs.Maker((9, 6, 3))
    graph = real_result(m, m.conv("conv", m.quantize(), 6, relu=False), pool=pool)
    assert_equal(graph, graphs.normalized(graphs.pixels(graph, 3)))


def refused(graph, match, **options):
    with pytest.raises(ExportError, match=match):
        onnx_model(graph, **options)


def test_what_onnx_cannot_represent_raises_an_error():
    refused(graphs.build("mlp", requantization="fixed_point"), "'fixed_point'")
    refused(graphs.build("mlp"), "got 'png'", input="png")
    refused(graphs.build("mlp"), r"opset must be in 13\.\.\d+, got 12", opset=12)
    graph = graphs.build("mlp")
    without = dataclasses.replace(graph.quantize, table=None)
    graph = dataclasses.replace(graph, nodes=(without, *graph.nodes[1:]))
    refused(graph, "node 'input': the network has no table", input="uint8")
    m = graphs.Maker((9, 9, 3))
    m.conv("cropped", m.quantize(), 4, padding=-1)
    refused(m.finish("cropped/output"), "node 'cropped'.*padding of 0 or more")
