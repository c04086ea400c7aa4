"""Export of the integer network to ONNX."""
