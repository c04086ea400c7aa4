"""One check of a network in every way in which it is computed."""

import numpy as np
from references import integer_graph

import jaxqat
from jaxqat.export import run_onnx


def result_everywhere(model, graph, x, path):
    """Return a network's result, after a check that all codes are the same everywhere.

    They are computed in the training graph, in NumPy, by the executors for CPU and TPU, and in ONNX
    Runtime.

    Args:
        model: The bound model that the network was converted from.
        graph: The network.
        x: A batch.
        path: Where the ONNX file is written.
    """
    check = jaxqat.verify(model, graph=graph, batches=[x])
    assert (check.differing, check.failures) == (0, ())
    codes, result = integer_graph.run(graph, x)
    for platform in ("cpu", "tpu"):
        network = jaxqat.make_executor(graph, platform=platform)
        found = network.codes(x)
        for key, wanted in codes.items():
            np.testing.assert_array_equal(found[key], wanted, err_msg=f"{platform} {key}")
        np.testing.assert_array_equal(network(x), result)
    found, onnx_codes = run_onnx(jaxqat.export_onnx(graph, path), x, expose=True)
    np.testing.assert_array_equal(found, result)
    for key, wanted in codes.items():
        np.testing.assert_array_equal(onnx_codes[key], wanted, err_msg=key)
    return result
