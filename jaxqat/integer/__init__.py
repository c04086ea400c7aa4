"""The deployed network: integers from one product to the next, on every platform the same.

    graph      `IntegerGraph`: tensors of codes and the nodes (`_nodes`) that make them
    _convert   from a quantized model to its graph
    _execute   the graph as a jitted function for CPU, CUDA and TPU
    _store     the graph as a folder of files
    _verify    the codes of the quantized model and of the graph, compared on data (`_compare`)

ARCHITECTURE.md has the picture.
"""
