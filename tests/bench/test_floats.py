"""The float baselines in JAX and PyTorch, against ONNX Runtime's run of `float_model`.

`float_model` shares only the equation of batch-norm folding with them. It is compared with float64
NumPy in tests/export/onnx/test_float_network.py.
"""

import jax
import numpy as np
import pytest
from integer import graphs

from jaxqat.bench.checks import BenchmarkError, float_limit, relative_error
from jaxqat.bench.floats import JaxNetwork, TorchNetwork

BOTH = pytest.mark.parametrize("symmetric", [False, True], ids=["int8", "int8_symmetric"])
EVERY = pytest.mark.parametrize("case", [case for case in graphs.CASES if case != "gated"])


def images_of(graph, count=3):
    return graphs.normalized(graphs.pixels(graph, count))


def reference(graph, images):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from jaxqat.export._onnx.float_network import float_model

    model = float_model(graph).SerializeToString()
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def assert_equal_floats(result, exact):
    # Sums of up to 300 float32 products in each of up to 10 layers: 10 * sqrt(300) * 2**-24 is
    # 1e-5 of the largest result; cancellation within a layer costs another factor of ten.
    np.testing.assert_allclose(result, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


@BOTH
@EVERY
def test_the_network_in_jax_is_the_float_network(case, symmetric):
    graph = graphs.build(case, symmetric=symmetric)
    network, images = JaxNetwork(graph, "fp32"), images_of(graph)
    assert_equal_floats(jax.jit(network.apply)(network.arrays(), images), reference(graph, images))


@EVERY
def test_weights_with_outputs_first_give_the_same_result(case):
    graph = graphs.build(case)
    network, images = JaxNetwork(graph, "fp32", outputs_first=True), images_of(graph)
    arrays = network.arrays()
    for node in graph.products():
        if node.kind == "conv":
            assert arrays[node.name][0].shape == (node.channels, *node.weights.shape[:-1])
    assert_equal_floats(jax.jit(network.apply)(arrays, images), reference(graph, images))


@BOTH
@EVERY
def test_the_network_in_pytorch_is_the_float_network(case, symmetric):
    torch = pytest.importorskip("torch")
    graph = graphs.build(case, symmetric=symmetric)
    network, images = TorchNetwork(graph, torch), images_of(graph)
    with torch.inference_mode():
        result = network.run(network.arrays(), torch.from_numpy(images)).numpy()
    assert_equal_floats(result, reference(graph, images))


def test_pytorchs_weights_are_channels_last():
    torch = pytest.importorskip("torch")
    graph = graphs.build("residual")
    network = TorchNetwork(graph, torch)
    for node in graph.products():
        weights, _ = network.arrays()[node.name]
        if node.kind == "conv":
            assert weights.is_contiguous(memory_format=torch.channels_last)


@EVERY
def test_bfloat16_rounds_as_bfloat16_and_stays_within_its_limit(case):
    graph = graphs.build(case)
    images, results = images_of(graph), {}
    for precision in ("fp32", "bf16"):
        network = JaxNetwork(graph, precision)
        results[precision] = jax.jit(network.apply)(network.arrays(), images)
        assert results[precision].dtype == np.float32
    error = relative_error(results["bf16"], results["fp32"])
    # One rounding to 8 bits costs about 2**-10 on average; float32 stays below 2**-18.
    assert 2**-12 < error < float_limit(graph, "bf16")


@pytest.mark.parametrize(
    ("precision", "wanted"), [("fp32", "HIGHEST"), ("tf32", "HIGH"), ("bf16", "DEFAULT")]
)
def test_products_request_their_precision_as_the_default_is_lower_on_accelerators(
    precision, wanted
):
    graph = graphs.build("residual")
    network = JaxNetwork(graph, precision)
    program = jax.jit(network.apply).lower(network.arrays(), images_of(graph)).as_text()
    products = [
        line
        for line in program.splitlines()
        if "stablehlo.convolution" in line or "stablehlo.dot_general" in line
    ]
    assert len(products) == len(list(graph.products()))
    for line in products:
        # The text may omit DEFAULT.
        assert f"{wanted}, {wanted}]" in line.replace("#stablehlo<precision ", "").replace(
            ">", ""
        ) or (wanted == "DEFAULT" and "HIGH" not in line)
        assert ("bf16" in line) == (precision == "bf16")


def test_weights_are_arguments_of_the_program_and_not_constants():
    graph = graphs.build("residual")
    network = JaxNetwork(graph, "fp32")
    program = jax.jit(network.apply).lower(network.arrays(), images_of(graph)).as_text()
    (head,) = [line for line in program.splitlines() if "func.func public @main" in line]
    assert head.count("%arg") == 1 + 2 * len(list(graph.products()))
    assert "stablehlo.transpose" not in program


def test_a_table_has_no_float_form_to_measure():
    graph = graphs.build("gated")
    network = JaxNetwork(graph, "fp32")
    with pytest.raises(BenchmarkError, match="'swish': a table of codes has no float form"):
        network.apply(network.arrays(), images_of(graph))
