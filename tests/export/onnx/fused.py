"""ONNX Runtime's own form of a model: which kernels it runs."""

import collections

import onnx
import onnxruntime as ort


def optimized(model, tmp_path, **entries):
    """How often each operation is in ONNX Runtime's own form of a model."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return collections.Counter(node.op_type for node in nodes)
