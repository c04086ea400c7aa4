"""Saved networks of one graph format, with inputs and codes, that every later version must read.

    PYTHONPATH=tests python -m golden.make

writes `format7/` anew. Only a new format may be added: what is here never changes.
"""

from pathlib import Path

import numpy as np
from integer import graphs
from references import integer_graph

import jaxqat

FOLDER = Path(__file__).parent / "format7"
NETWORKS = {
    "residual": graphs.build("residual", bits=4),
    "gated": graphs.build("gated"),
    "placed": graphs.build("placed"),
    "concat": graphs.build("concat", symmetric=True, requantization="fixed_point"),
}


def main() -> None:
    """Save each network, its images, its codes and its result."""
    FOLDER.mkdir(exist_ok=True)
    for case, graph in NETWORKS.items():
        images = graphs.pixels(graph, 2)
        codes, result = integer_graph.run(graph, images)
        jaxqat.save(graph, FOLDER / case)
        np.savez_compressed(FOLDER / f"{case}.npz", images=images, result=result, **codes)


if __name__ == "__main__":
    main()
