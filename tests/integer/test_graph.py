"""The integer graph's invariants: each broken once, and named by the error."""

import dataclasses
import re

import numpy as np
import pytest
from integer import graphs
from references import integer_graph

from jaxqat.integer import graph as g

GRAPH = graphs.build("residual")
POOLED = graphs.build("concat")  # It has a Requantize, too.


def first(graph, node_type, **fields):
    """The first node of a type whose fields have these values, and its place."""
    return next(
        (place, node)
        for place, node in enumerate(graph.nodes)
        if isinstance(node, node_type) and all(getattr(node, k) == v for k, v in fields.items())
    )


def with_node(graph, node_type, **changes):
    """Return the graph with changes to the first node of a type."""
    index, node = first(graph, node_type)
    nodes = list(graph.nodes)
    nodes[index] = dataclasses.replace(node, **changes)
    return dataclasses.replace(graph, nodes=tuple(nodes))


def with_tensor(graph, name, **changes):
    """Return the graph with changes to a tensor."""
    tensors = {**graph.tensors, name: dataclasses.replace(graph.tensors[name], **changes)}
    return dataclasses.replace(graph, tensors=tensors)


def refused(match):
    return pytest.raises(g.GraphError, match=match)


def test_the_printed_form_is_one_line():
    size = f"{POOLED.size_bytes():,} bytes of weights"
    shapes = f"{POOLED.input_shape} -> {POOLED.output_shape}"
    assert repr(POOLED) == f"IntegerGraph({shapes}, {len(POOLED.nodes)} nodes, {size})"


def test_a_node_that_reads_a_later_tensor_is_refused():
    nodes = (*GRAPH.nodes[:2], GRAPH.nodes[3], GRAPH.nodes[2], *GRAPH.nodes[4:])
    with refused(f"node {nodes[2].name!r}: reads {nodes[2].inputs[0]!r}, which no node before it"):
        dataclasses.replace(GRAPH, nodes=nodes)


def test_a_tensor_made_twice_is_refused():
    copy = dataclasses.replace(GRAPH.nodes[1], name="again")
    nodes = (*GRAPH.nodes[:2], copy, *GRAPH.nodes[2:])
    with refused(f"node 'again': makes {copy.output!r}, which an earlier node makes already"):
        dataclasses.replace(GRAPH, nodes=nodes)


def test_a_tensor_that_no_node_makes_is_refused():
    spare = dataclasses.replace(GRAPH.tensors["input"], name="spare")
    with refused("no node makes 'spare'"):
        dataclasses.replace(GRAPH, tensors={**GRAPH.tensors, "spare": spare})


def test_a_node_that_makes_no_tensor_of_the_graph_is_refused():
    tensors = {name: t for name, t in GRAPH.tensors.items() if name != "stem/output"}
    with refused("node 'stem': makes 'stem/output', which is not a tensor of the graph"):
        dataclasses.replace(GRAPH, tensors=tensors)


SCORES = (g.Output(name="scores", shape=GRAPH.output_shape),)


def test_an_output_that_no_node_makes_is_refused():
    with refused("node 'head': makes 'logits', which is not a tensor"):
        dataclasses.replace(GRAPH, outputs=SCORES)
    with refused("no node makes 'scores'"):
        dataclasses.replace(GRAPH, nodes=GRAPH.nodes[:-1], outputs=SCORES)


def test_each_input_is_read_by_its_name():
    _, quantize = first(GRAPH, g.Quantize)
    with refused("reads 'input', which no node"):
        dataclasses.replace(GRAPH, nodes=GRAPH.nodes[1:])
    (image,) = GRAPH.inputs
    second = g.Input(shape=image.shape, path=(1, "mask"))
    with refused("no Quantize or FloatOp node reads the input 1/mask"):
        dataclasses.replace(GRAPH, inputs=(image, second))
    again = dataclasses.replace(quantize, name="again", output="again", inputs=(second.name,))
    tensors = {**GRAPH.tensors, "again": dataclasses.replace(GRAPH.tensors["input"], name="again")}
    with refused("reads '<input 1/mask>', which no node"):
        dataclasses.replace(GRAPH, nodes=(*GRAPH.nodes, again), tensors=tensors)
    both = dataclasses.replace(
        GRAPH, nodes=(*GRAPH.nodes, again), tensors=tensors, inputs=(image, second)
    )
    assert both.entries == ()  # No island makes them.
    with pytest.raises(g.GraphError, match=r"reads 2 arrays \(0, 1/mask\), not one"):
        both.input_shape  # noqa: B018


@pytest.mark.parametrize("paths", [((),), ((0,), (0,)), ((0,), (0, "a")), (("x",), ("x", 1))])
def test_two_inputs_have_no_place_in_common(paths):
    inputs = tuple(g.Input(shape=GRAPH.input_shape, path=path) for path in paths)
    with refused("inputs: "):
        dataclasses.replace(GRAPH, inputs=inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"low": -129},
        {"high": 128},
        {"low": 5, "high": 4},
        {"zero_point": -129},
        {"zero_point": 128},
    ],
    ids=str,
)
def test_codes_and_zero_points_beyond_int8_are_refused(changes):
    with refused(r"tensor 'stem/output': codes .* with zero point .* do not fit int8"):
        with_tensor(GRAPH, "stem/output", **changes)


@pytest.mark.parametrize("scale", [0, -1, np.nan, np.inf])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale):
    with refused(f"tensor 'stem/output': the scale must be positive and finite, got .*{scale}"):
        with_tensor(GRAPH, "stem/output", scale=np.float32(scale))


ARRAYS = {"weights": np.int8, "bias": np.int32, "multiplier": np.float32}
ARRAYS |= {"weight_scale": np.float32}


@pytest.mark.parametrize("field", ARRAYS)
def test_an_array_of_another_type_is_refused(field):
    array = getattr(first(GRAPH, g.Product)[1], field)
    dtype = np.dtype(ARRAYS[field]).name
    with refused(f"node 'stem': {field} must be {dtype}.*, got float64 "):
        with_node(GRAPH, g.Product, **{field: array.astype(np.float64)})


@pytest.mark.parametrize("field", ["bias", "multiplier", "weight_scale"])
def test_an_array_without_one_number_per_channel_is_refused(field):
    array = getattr(first(GRAPH, g.Product)[1], field)
    with refused(rf"node 'stem': {field} must be .* \(8,\), got .* \(7,\)"):
        with_node(GRAPH, g.Product, **{field: array[:-1]})


def test_weights_for_another_number_of_channels_are_refused():
    weights = first(GRAPH, g.Product)[1].weights
    with refused(r"node 'stem': weights \(3, 3, 2, 8\) in 1 group\(s\) need 2 .* 'input' has 3"):
        with_node(GRAPH, g.Product, weights=weights[:, :, :2])
    with refused("node 'stem': weights .* in 2 group.s. need 6 channels"):
        with_node(GRAPH, g.Product, groups=2)


def test_a_table_of_another_type_or_shape_is_refused():
    table = GRAPH.quantize.table
    assert table is not None
    for bad in (table.astype(np.uint8), table[:, :2], table[1:]):
        with refused(r"node 'input': table must be int8 \(256, 3\), .* got "):
            with_node(GRAPH, g.Quantize, table=bad)


BAD = pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf])


@BAD
@pytest.mark.parametrize("field", ["multiplier", "weight_scale"])
def test_one_channel_s_factor_that_is_not_positive_and_finite_is_refused(field, bad):
    array = getattr(first(GRAPH, g.Product)[1], field).copy()
    array[3] = bad
    with refused(f"node 'stem': {field} is not positive and finite everywhere"):
        with_node(GRAPH, g.Product, **{field: array})


@BAD
@pytest.mark.parametrize(
    "node_type, field",
    [(g.Quantize, "inverse"), (g.Requantize, "multiplier"), (g.SumPool, "multiplier")],
)
def test_a_factor_that_is_not_positive_and_finite_is_refused(node_type, field, bad):
    graph = POOLED if node_type is g.Requantize else GRAPH
    _, node = first(graph, node_type)
    with refused(f"node {node.name!r}: {field} is not positive and finite, got .*{bad}"):
        with_node(graph, node_type, **{field: np.float32(bad)})


def test_an_addition_has_two_inputs_and_a_factor_for_each():
    _, node = first(GRAPH, g.Add)
    with refused(f"node {node.name!r}: has 2 inputs and 1 factors; a sum has two of each"):
        with_node(GRAPH, g.Add, factors=node.factors[:1])


@pytest.mark.parametrize(
    ("factors", "shift", "problem"),
    [
        ((0, 5), 3, "factors are positive"),
        ((4, 5), -1, "shift is from 0 to 15"),
        ((4, 5), 16, "shift is from 0 to 15"),
        # 255 (33,026 + 32,768) is 254 above 2**24.
        ((1, 33_025), 15, "may reach 2..24"),
    ],
)
def test_an_addition_that_float32_could_not_hold_is_refused(factors, shift, problem):
    _, node = first(GRAPH, g.Add)
    with refused(f"node {node.name!r}: has the factors .*{problem}"):
        with_node(GRAPH, g.Add, factors=factors, shift=shift)


@pytest.mark.parametrize("changes", [{"zero_point": 3}, {"low": -120}, {"high": 100}], ids=str)
def test_codes_are_not_moved_onto_another_grid(changes):
    """A platform that derives the storage offset from the bounds would read wrong codes."""
    with refused("node 'pool': moves codes .* from 'stem/output' to 'pool/output'.*the same"):
        with_tensor(GRAPH, "pool/output", **changes)


def test_parts_of_a_concatenation_share_its_zero_point_and_may_be_clipped():
    _, node = first(POOLED, g.Concat)
    with refused("node 'join': moves codes"):
        with_tensor(POOLED, node.inputs[0], zero_point=5)
    part = POOLED.tensors[node.inputs[0]]
    with_tensor(POOLED, node.inputs[0], low=part.low + 1)


@pytest.mark.parametrize("graph", [GRAPH, POOLED, graphs.build("moves")], ids=["a", "b", "c"])
def test_a_tensor_of_another_shape_than_its_node_makes_is_refused(graph):
    for node in graph.nodes:
        if node.output in graph.tensors:
            shape = graph.tensors[node.output].shape
            bad = (*shape[:-1], shape[-1] + 1)
            # A reader of the tensor may raise first, by its channels.
            with refused(rf"{node.name!r}: makes .*of shape .*, which is declared|need|table"):
                with_tensor(graph, node.output, shape=bad)
    with refused(r"of shape .*, which is declared as \(77,\)"):
        dataclasses.replace(graph, outputs=(g.Output(name=graph.output.name, shape=(77,)),))


def test_a_reshape_to_another_number_of_codes_is_refused():
    graph = graphs.build("mlp")
    with refused("node 'flat': reshapes .* another size"):
        with_node(graph, g.Move, shape=(7,))


def test_terms_of_different_shapes_are_refused():
    graph = graphs.build("residual")
    _, node = first(graph, g.Add)
    with refused(f"node {node.name!r}: adds the shapes .*, which differ"):
        with_node(graph, g.Add, inputs=(node.inputs[0], "input"))


def product_of(codes_high, inputs, bias):
    """Return a dense layer whose accumulator is at most inputs * 127 * codes_high + bias."""
    tensor = g.Tensor(
        name="x", shape=(inputs,), scale=np.float32(1), zero_point=0, low=0, high=codes_high
    )
    one = np.ones(1, np.float32)
    product = g.Product(
        name="stage1/dense",
        inputs=("x",),
        output="y",
        kind="dense",
        weights=np.full((inputs, 1), 127, np.int8),
        bias=np.array([bias], np.int32),
        multiplier=one,
        weight_scale=one,
    )
    quantize = g.Quantize(name="q", inputs=(g.INPUT,), output="x", inverse=np.float32(1))
    return g.IntegerGraph(
        inputs=(g.Input(shape=(inputs,)),),
        tensors={"x": tensor},
        nodes=(quantize, product),
        outputs=(g.Output(name="y", shape=(1,)),),
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_an_accumulator_that_can_leave_int32_by_one_is_refused_by_the_layer_s_name(sign):
    inputs, most = 1000, 2**31 - 1
    bias = most - inputs * 127 * 127 if sign > 0 else -most
    graph = product_of(127, inputs, bias)
    assert next(graph.products()).accumulator_bound(graph.tensors["x"]) == most
    with refused("node 'stage1/dense': its accumulator, .* can reach 2147483648, beyond int32"):
        product_of(127, inputs, bias + sign)


@pytest.mark.parametrize("case", ["residual", "depthwise", "mlp"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_accumulator_bound_is_reached_by_the_worst_codes(case, symmetric):
    graph = graphs.build(case, symmetric=symmetric)
    for node in graph.products():
        tensor = graph.tensors[node.inputs[0]]
        weights = node.weights.reshape(-1, node.channels).astype(int)
        sums = []
        for sign in (1, -1):
            # The codes that make a channel's sum as large, or as small, as it can be.
            codes = np.where(sign * weights > 0, tensor.high, tensor.low) - tensor.zero_point
            sums.append(np.abs((codes * weights).sum(0) + node.bias))
        assert node.accumulator_bound(graph.tensors[node.inputs[0]]) == np.max(sums)


def test_the_real_zeros_of_padding_count_in_the_bound():
    """After a clip to codes above the zero point, the real zero lies outside of the bounds."""
    graph = product_of(100, 10, 5)
    tensor = dataclasses.replace(graph.tensors["x"], low=90)
    graph = dataclasses.replace(graph, tensors={"x": tensor})
    node = next(graph.products())
    assert node.accumulator_bound(graph.tensors[node.inputs[0]]) == 10 * 127 * 100 + 5
    # All taps on padding.
    node = dataclasses.replace(node, bias=np.array([-(10 * 127 * 100)], np.int32))
    assert node.accumulator_bound(graph.tensors[node.inputs[0]]) == 10 * 127 * 100


def test_size_is_the_sum_of_the_arrays():
    weights = [p.weights.size for p in GRAPH.products()]
    channels = [p.weights.shape[-1] for p in GRAPH.products()]
    assert GRAPH.size_bytes() == sum(weights) + 8 * sum(channels)  # int8; int32 and float32.


@pytest.mark.parametrize(("bits", "packed"), [(2, 4), (3, 2), (4, 2), (5, 1), (7, 1), (8, 1)])
def test_weights_of_few_bits_count_as_they_are_packed(bits, packed):
    quantize, product = product_of(1, 7, 0).nodes  # Seven weights leave the last byte partly empty.
    narrow = dataclasses.replace(product, weights=np.ones((7, 1), np.int8), weight_bits=bits)
    graph = dataclasses.replace(product_of(1, 7, 0), nodes=(quantize, narrow))
    assert graph.size_bytes() == -(-7 // packed) + 8


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_code_beyond_its_bits_is_refused_by_the_layer_s_name(bits, sign):
    weights = first(GRAPH, g.Product)[1].weights * 0
    weights[0, 0, 0, 0] = sign * (2 ** (bits - 1) - 1)
    with_node(GRAPH, g.Product, weights=weights, weight_bits=bits)
    if (bits, sign) == (8, 1):
        return  # int8 has no 128.
    weights[0, 0, 0, 0] += sign
    largest = 2 ** (bits - 1)
    with refused(rf"'stem': weight_bits must .* got {bits} and a code of magnitude {largest}\."):
        with_node(GRAPH, g.Product, weights=weights, weight_bits=bits)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_weight_bits_beyond_2_to_8_are_refused(bits):
    weights = first(GRAPH, g.Product)[1].weights * 0
    with refused(rf"node 'stem': weight_bits must be in 2\.\.8 .* got {bits} and"):
        with_node(GRAPH, g.Product, weights=weights, weight_bits=bits)


def test_all_readers_of_a_residual_stream_are_listed():
    assert [n.name for n in GRAPH.readers("pool/output")] == ["block0/conv1", "block0/add"]
    assert GRAPH.readers("logits") == []


def test_the_reference_interpreter_runs_the_unchanged_graph():
    """So each error above comes from the change alone."""
    codes, _ = integer_graph.run(GRAPH, graphs.pixels(GRAPH, 2))
    assert set(codes) == set(GRAPH.tensors)


@pytest.mark.parametrize(
    ("graph", "node_type", "changes", "message"),
    [
        (GRAPH, g.Product, {"strides": (0, 1)}, "strides (0, 1) and dilation (1, 1) must be"),
        (GRAPH, g.Product, {"dilation": (1, -1)}, "dilation (1, -1) must be positive"),
        (GRAPH, g.Product, {"strides": (1,)}, "needs window, strides, padding and dilation of 2"),
        (GRAPH, g.Product, {"padding": ((2**40, 0), (1, 1))}, "input with padding: sizes must be"),
        (GRAPH, g.Product, {"padding": ((-99, 0), (1, 1))}, "input with padding: sizes must be"),
        (GRAPH, g.Product, {"groups": 0}, "are not in 0 equal group(s)"),
        (GRAPH, g.Product, {"kind": "dense"}, "weights of a dense"),
        (GRAPH, g.MaxPool, {"strides": (0, 0)}, "must be positive"),
        (GRAPH, g.MaxPool, {"window": (2**40, 1), "padding": ((2**40, 0), (0, 0))}, "2**31"),
        (POOLED, g.SumPool, {"strides": (0, 1)}, "must be positive"),
        (POOLED, g.Concat, {"axis": 9}, "concatenates along axis 9, which an input lacks"),
        (graphs.build("moves"), g.Move, {"kind": "slice", "strides": (0,)}, "slice of"),
        (graphs.build("moves"), g.Move, {"kind": "transpose", "axes": (0, 1, 1, 3)}, "transpose"),
    ],
)
def test_an_impossible_geometry_is_refused(graph, node_type, changes, message):
    with refused(re.escape(message)):
        with_node(graph, node_type, **changes)


@pytest.mark.parametrize("shape", [(0, 8, 8), (-4, 8, 8), (2**40, 1, 1), (2**16, 2**16, 1)])
def test_sizes_that_no_tensor_has_are_refused(shape):
    with refused("tensor 'input': sizes must be positive, with fewer than 2\\*\\*31 elements"):
        with_tensor(GRAPH, "input", shape=shape)
    with refused("outputs: .*: sizes must be positive"):
        dataclasses.replace(GRAPH, outputs=(g.Output(name=GRAPH.output.name, shape=shape),))
    with refused("inputs: 0: sizes must be positive"):
        dataclasses.replace(GRAPH, inputs=(g.Input(shape=shape),))


@pytest.mark.parametrize("labels", [[], ["cat"], [str(i) for i in range(6)]])
def test_labels_are_as_many_as_classes(labels):
    names = [str(i) for i in range(5)]
    assert dataclasses.replace(GRAPH, metadata={"labels": names}).metadata["labels"] == names
    with refused(f"metadata.labels names {len(labels)} classes"):
        dataclasses.replace(GRAPH, metadata={"labels": labels})
