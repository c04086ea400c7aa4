"""Every node kind survives JSON and arrays unchanged; each error names the field."""

import dataclasses
import json

import numpy as np
import pytest
from integer import float_cases, graphs

from jaxqat.integer import graph as g
from jaxqat.integer._store.codec import CodecError, decode, encode

GRAPHS = [graphs.build(name, bits=bits) for name in graphs.CASES for bits in (3, 8)]
GRAPHS += [float_cases.island(bits=bits) for bits in (3, 8)]


def same(found, wanted):
    if isinstance(wanted, np.ndarray):
        return (
            type(found) is type(wanted)
            and found.dtype == wanted.dtype
            and np.array_equal(found, wanted)
        )
    return type(found) is type(wanted) and found == wanted


@pytest.mark.parametrize("kind", g.NODE_KINDS, ids=lambda kind: kind.__name__)
def test_every_field_of_every_kind_of_node_comes_back(kind):
    seen = 0
    for graph in GRAPHS:
        decoded = decode(*encode(graph))
        for before, after in zip(graph.nodes, decoded.nodes, strict=True):
            if type(before) is kind:
                seen += 1
                assert type(after) is kind
                for field in dataclasses.fields(kind):
                    assert same(getattr(after, field.name), getattr(before, field.name)), field.name
    assert seen


@pytest.mark.parametrize("kind", g.NODE_KINDS, ids=lambda kind: kind.__name__)
def test_every_missing_or_unknown_field_of_every_kind_of_node_is_named(kind):
    graph = next(graph for graph in GRAPHS if any(type(n) is kind for n in graph.nodes))
    text, arrays = encode(graph)
    place = next(i for i, node in enumerate(graph.nodes) if type(node) is kind)
    for field in dataclasses.fields(kind):
        content = json.loads(text)
        content["nodes"][place][f"{field.name}s"] = content["nodes"][place].pop(field.name)
        with pytest.raises(CodecError, match=rf"nodes\[{place}\]\.{field.name}s: .* no such field"):
            decode(json.dumps(content), arrays)
        del content["nodes"][place][f"{field.name}s"]
        with pytest.raises(CodecError, match=rf"nodes\[{place}\]\.{field.name}: is missing"):
            decode(json.dumps(content), arrays)


@pytest.mark.parametrize("kind", g.NODE_KINDS, ids=lambda kind: kind.__name__)
def test_every_field_of_another_type_is_named(kind):
    graph = next(graph for graph in GRAPHS if any(type(n) is kind for n in graph.nodes))
    text, arrays = encode(graph)
    place = next(i for i, node in enumerate(graph.nodes) if type(node) is kind)
    for field in dataclasses.fields(kind):
        content = json.loads(text)
        content["nodes"][place][field.name] = 5.5
        with pytest.raises(CodecError, match=rf"nodes\[{place}\]\.{field.name}: must be "):
            decode(json.dumps(content), arrays)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_are_packed_by_the_width_that_their_node_declares(bits):
    text, arrays = encode(graphs.build("mlp", bits=bits))
    fields = next(n for n in json.loads(text)["nodes"] if n["node"] == "Product")["weights"]
    width = {2: 2, 3: 4, 4: 4}.get(bits)
    assert fields.get("packed") == width
    count = int(np.prod(fields["shape"]))
    assert arrays[fields["array"]].nbytes == (count if width is None else -(-count * width // 8))


def test_arrays_are_named_by_their_layer():
    text, arrays = encode(graphs.build("mlp"))
    fields = next(n for n in json.loads(text)["nodes"] if n["node"] == "Product")["weights"]
    assert fields["array"].endswith(":nodes.dense1.weights")
    assert fields["array"] in arrays


def test_a_tensor_under_another_name_is_refused():
    graph = graphs.build("mlp")
    tensors = dict(graph.tensors)
    tensors["input"] = dataclasses.replace(tensors["input"], name="other")
    with pytest.raises(CodecError, match="the tensor under 'input' has the name 'other'"):
        encode(dataclasses.replace(graph, tensors=tensors))
