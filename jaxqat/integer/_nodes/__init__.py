"""The kinds of nodes of an integer graph, one file for each: fields, invariants and shape."""
