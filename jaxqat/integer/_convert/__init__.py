"""From a quantized model to an integer graph."""
