"""Networks that earlier versions saved are read, and compute what they computed then."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import jaxqat

SAVED = sorted(path.parent for path in Path(__file__).parent.glob("format*/*/graph.json"))


def test_each_format_has_networks():
    assert Counter(path.parent.name for path in SAVED) == {"format5": 5, "format6": 4, "format7": 4}


@pytest.mark.slow
@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_saved_network_computes_the_recorded_codes(path):
    graph = jaxqat.load(path)
    network = jaxqat.make_executor(graph)
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as recorded:
        found = network.codes(recorded["images"])
        assert {*recorded.files} == {*graph.tensors, "images", "result"}
        for name, codes in found.items():
            np.testing.assert_array_equal(codes, recorded[name], err_msg=name)
        np.testing.assert_array_equal(network(recorded["images"]), recorded["result"])
