"""Every part of the library handles every node kind, so that no new kind is forgotten."""

import inspect
import re

import pytest
from references import integer_graph

from jaxqat.bench.floats import JaxNetwork, TorchNetwork
from jaxqat.integer import graph as g
from jaxqat.integer._convert import emit
from jaxqat.integer._execute.executor import PLATFORMS
from jaxqat.integer._store import codec
from jaxqat.integer._visitor import GraphVisitor
from jaxqat.quant import _forms as forms

METHODS = {re.sub(r"(?<=.)([A-Z])", r"_\1", kind.__name__).lower() for kind in g.NODE_KINDS}


def test_every_kind_of_node_is_listed():
    assert set(g.NODE_KINDS) == set(g.Node.__subclasses__())


def test_a_visitor_has_one_method_for_each_kind_of_node():
    assert GraphVisitor.__abstractmethods__ == METHODS


@pytest.mark.parametrize("visitor", [*PLATFORMS.values(), JaxNetwork, TorchNetwork])
def test_no_kind_of_node_is_missing_in_execution(visitor):
    assert issubclass(visitor, GraphVisitor)
    assert not inspect.isabstract(visitor)


def test_no_kind_of_node_is_missing_in_the_onnx_writers():
    pytest.importorskip("onnx")
    from jaxqat.export._onnx.float_network import OnnxFloatWriter
    from jaxqat.export._onnx.nodes import OnnxWriter

    for visitor in (OnnxWriter, OnnxFloatWriter):
        assert issubclass(visitor, GraphVisitor)
        assert not inspect.isabstract(visitor)


def test_no_kind_of_node_is_missing_in_storage():
    assert set(codec._CLASSES.values()) == set(g.NODE_KINDS)


def test_no_kind_of_node_is_missing_in_the_reference():
    cases = re.findall(r"case g\.(\w+)\(\)", inspect.getsource(integer_graph.step))
    assert sorted(cases) == sorted(kind.__name__ for kind in g.NODE_KINDS)


@pytest.mark.parametrize("kind", g.NODE_KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_node_has_a_shape_and_a_check_of_its_own(kind):
    assert {"output_shape", "check"} <= vars(kind).keys()


def test_no_integer_form_is_missing_in_conversion():
    """Every class with a method `in_units` is an integer form."""
    classes = vars(forms).values()
    known = {c for c in classes if isinstance(c, type) and hasattr(c, "in_units")}
    assert set(emit._EMITTERS) == known - {forms.Form, forms.Either}
