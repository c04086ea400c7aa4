# pyright: strict
"""Node kinds of an integer graph, one file each: fields, invariants and output shape."""
