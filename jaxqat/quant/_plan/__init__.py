"""Which tensors are quantized, where, by which settings, and why not."""
