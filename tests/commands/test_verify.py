"""`jaxqat verify` of a network whose codes differ: is it another one, or from another device?"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny_run
from tiny_run import run_command

import jaxqat
from jaxqat.integer import graph as g

pytestmark = pytest.mark.slow

small_network, finished = tiny_run.small_network, tiny_run.finished


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run whose integer network has other multipliers."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    graph = jaxqat.load(run / "integer")
    nodes = tuple(
        dataclasses.replace(node, multiplier=node.multiplier * 1.02)
        if isinstance(node, g.Product) and node.multiplier is not None
        else node
        for node in graph.nodes
    )
    shutil.rmtree(run / "integer")
    jaxqat.save(dataclasses.replace(graph, nodes=nodes), run / "integer")
    return run


@pytest.mark.parametrize("elsewhere", [False, True])
def test_differing_codes_of_a_network_from_another_processor_are_told_with_both(
    run, small_network, capsys, elsewhere
):
    results = json.loads((run / "results.json").read_text())
    here = results["environment"]["processor"]
    if elsewhere:
        results["environment"]["processor"] = "Abacus (wood)"
        (run / "results.json").write_text(json.dumps(results))
    assert run_command("verify", run) == 1
    out = capsys.readouterr().out
    assert "codes differ (by at most" in out
    jaxlib = results["environment"]["jaxlib"]
    made = f"the network was made on Abacus (wood) with jaxlib {jaxlib}"
    computed = f"computed here, on {here} with jaxlib {jaxlib}"
    assert (made in out, computed in out) == (elsewhere, elsewhere)
