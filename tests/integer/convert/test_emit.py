"""Each integer form becomes the nodes that compute it."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxqat.integer import graph as g
from jaxqat.integer._convert.emit import Emitter
from jaxqat.integer._convert.fields import Bounds, Deferred
from jaxqat.integer._convert.geometry import UnconvertibleError
from jaxqat.quant import _forms as forms
from jaxqat.quant._numerics.grids import Grid

SHAPE = (4, 4, 2)


def grid(scale=0.5, zero=3):
    scale = jnp.float32(scale)
    return Grid(scale, 1 / scale, jnp.int32(zero), -128, 127)


GRID, OTHER = grid(), grid(0.25, -1)


def codes(shape=SHAPE, key=("x",), on=OTHER):
    return forms.Codes(jnp.zeros((1, *shape), jnp.int8), on, key)


def operation(name, bind, **params):
    return forms.Operation(name, params, bind)


def emitted(form, shape=SHAPE, **tensors):
    """Nodes and tensors, finished, that put a form on GRID as the tensor 'y'."""
    given = [((0,), form.values)] if isinstance(form, forms.Real) else []
    emitter = Emitter(given=given)
    emitter.tensors.update(tensors)
    emitter.emit(form, GRID, "y", shape, Bounds())

    def finished(value: Any) -> Any:
        if isinstance(value, Deferred):
            return value.finish(np.asarray(emitter.arrays[value.index]))
        return tuple(map(finished, value)) if isinstance(value, tuple) else value

    def fields(values: dict[str, Any]) -> Any:
        return types.SimpleNamespace(**{key: finished(value) for key, value in values.items()})

    nodes = [(kind, fields(values)) for kind, values in emitter.nodes]
    return nodes, {name: fields(values) for name, values in emitter.tensors.items()}


def test_the_input_becomes_a_quantize():
    ((kind, node),), tensors = emitted(forms.Real(jnp.zeros((1, *SHAPE))))
    assert kind is g.Quantize
    assert (node.inputs, node.output, node.inverse) == ((g.INPUT,), "y", 2)
    tensor = tensors["y"]
    assert (tensor.shape, tensor.scale, tensor.zero_point) == (SHAPE, 0.5, 3)
    assert (tensor.low, tensor.high) == (-128, 127)


def test_a_float_operation_is_refused_with_its_name():
    with pytest.raises(UnconvertibleError, match="y: sin before it has no integer form"):
        emitted(forms.Real(jnp.zeros((1, *SHAPE)), "sin"))


def test_codes_become_a_requantization():
    ((kind, node),), _ = emitted(codes())
    assert kind is g.Requantize
    assert (node.inputs, node.output, node.multiplier) == (("x",), "y", 0.5)


def test_a_sum_of_codes_becomes_one_addition():
    ((kind, node),), _ = emitted(forms.Sum(codes(), codes(key=("z",), on=GRID)))
    assert kind is g.Add
    # Half a unit and a whole one: (1 + 1.5) 2**14 is below 2**16, and for 2**15 it is not.
    assert (node.inputs, node.factors, node.shift) == (("x", "z"), (2**13, 2**14), 14)


def test_a_sum_with_a_term_that_is_not_quantized_is_refused():
    with pytest.raises(UnconvertibleError, match="y: adds a tensor that is not quantized"):
        emitted(forms.Sum(codes(), forms.Real(jnp.zeros((1, *SHAPE)))))


def test_a_clamp_becomes_the_bounds_of_its_tensor():
    nodes, tensors = emitted(forms.Clamp(codes(), 0.0, 6.0))
    assert [kind for kind, _ in nodes] == [g.Requantize]
    # Codes of 0 and 6 on a grid of halves with the zero point 3.
    assert (tensors["y"].low, tensors["y"].high) == (3, 15)


def test_clamps_that_do_not_overlap_become_two_nodes():
    nodes, tensors = emitted(forms.Clamp(forms.Clamp(codes(), None, 1.0), 2.0, None))
    assert [kind for kind, _ in nodes] == [g.Requantize, g.Requantize]
    assert (tensors["y/clipped"].high, tensors["y"].low) == (5, 7)


def test_a_move_becomes_a_move_behind_its_source():
    bind = lambda x: jnp.transpose(x, (0, 2, 1, 3))  # noqa: E731
    form = forms.Moved(codes((4, 3, 2)), operation("transpose", bind, permutation=(0, 2, 1, 3)))
    ((first, _), (kind, node)), tensors = emitted(form, (3, 4, 2))
    assert (first, kind) == (g.Requantize, g.Move)
    assert (node.inputs, node.output) == (("y/unmoved",), "y")
    assert (node.kind, node.axes) == ("transpose", (0, 2, 1, 3))
    assert (tensors["y/unmoved"].shape, tensors["y"].shape) == ((4, 3, 2), (3, 4, 2))


def test_a_concatenation_becomes_a_concat_of_its_parts():
    join = operation("concatenate", lambda *x: jnp.concatenate(x, 3), dimension=3)
    form = forms.Joined((codes(), codes(key=("z",))), join)
    (*parts, (kind, node)), tensors = emitted(form, (4, 4, 4))
    assert [part for part, _ in parts] == [g.Requantize, g.Requantize]
    assert (kind, node.axis, node.inputs) == (g.Concat, 3, ("y/part0", "y/part1"))
    assert [tensors[name].shape for name in node.inputs] == [SHAPE, SHAPE]


def test_a_concatenation_of_batches_is_refused():
    join = operation("concatenate", lambda *x: jnp.concatenate(x, 0), dimension=0)
    with pytest.raises(UnconvertibleError, match="y: a concatenation of batches"):
        emitted(forms.Joined((codes(), codes()), join))


def accumulator(source, total, *, scale=(1.0,), offset=(0.0,)):
    return forms.Accumulator(
        total=jnp.asarray(total, jnp.int32),
        correction=jnp.int32(0),
        input_scale=jnp.float32(0.25),
        weight_scale=jnp.asarray(scale, jnp.float32),
        offset=jnp.asarray(offset, jnp.float32),
        source=source,
    )


def dense_source(weights):
    numbers = (((1,), (0,)), ((), ()))
    params = {"dimension_numbers": numbers}
    product: Any = types.SimpleNamespace(
        kind="dense", params=params, weight_side=1, channel_axes=(0,)
    )
    return forms.Multiplied("head", product, codes((3,)), jnp.asarray(weights, jnp.int8), 8)


def test_a_dense_layer_becomes_a_product_with_positive_multipliers():
    weights = np.arange(6).reshape(3, 2)
    form = accumulator(
        dense_source(weights), np.zeros((1, 2)), scale=[[2.0, -4.0]], offset=[[1.0, 2.0]]
    )
    ((kind, node),), _ = emitted(form, (2,))
    assert (kind, node.kind, node.name) == (g.Product, "dense", "head")
    assert (node.inputs, node.output, node.weight_bits) == (("x",), "y", 8)
    np.testing.assert_array_equal(node.weights, weights)
    # The sign of the second channel goes to its weights and bias: 2 / (0.25 * -4) is -2.
    np.testing.assert_array_equal(node.weight_signs, [1, -1])
    np.testing.assert_array_equal(node.bias, [2, 2])
    np.testing.assert_array_equal(node.weight_scale, [2, 4])
    np.testing.assert_array_equal(node.multiplier, [1, 2])  # 0.25 * scale / 0.5.
    assert node.bias.dtype == np.int32 and node.weights.dtype == np.int8


def test_a_channel_without_weight_is_silenced_and_keeps_a_positive_multiplier():
    form = accumulator(dense_source(np.ones((3, 2))), np.zeros((1, 2)), scale=[[1.0, 0.0]])
    ((_, node),), _ = emitted(form, (2,))
    np.testing.assert_array_equal(node.weight_signs, [1, 0])
    np.testing.assert_array_equal(node.bias, [0, 0])
    assert (node.multiplier > 0).all() and (node.weight_scale > 0).all()


def test_a_mean_over_space_becomes_a_sum_pool():
    source = forms.Summed(operation("reduce_sum", lax.reduce_sum_p.bind, axes=(1, 2)), codes())
    form = accumulator(source, np.zeros((1, 2)), scale=1 / 16, offset=0.0)
    ((kind, node),), _ = emitted(form, (2,))
    assert (kind, node.inputs, node.window) == (g.SumPool, ("x",), (4, 4))
    assert node.drop_axes and node.multiplier == 0.25 / 16 / 0.5


def test_moved_codes_are_made_once_for_all_their_readers():
    source = codes((4, 3, 2))
    flip = operation("rev", lambda x: jax.lax.rev(x, (1,)), dimensions=(1,))
    moved = forms.Codes(source.codes, OTHER, moved=(flip, source))
    tensor = {"name": "x", "shape": (4, 3, 2), "low": -128, "high": 127}
    nodes, _ = emitted(forms.Sum(moved, moved), (4, 3, 2), x=tensor)
    assert [kind for kind, _ in nodes] == [g.Move, g.Add]
    assert nodes[1][1].inputs == ("x/rev", "x/rev")


def test_a_function_of_codes_becomes_a_table_within_the_bounds():
    function = forms.Tabulated(codes(), operation("tanh", jnp.tanh), (forms.Tabulated(codes()),))
    ((kind, node),), tensors = emitted(forms.Clamp(function, low=0.0))
    assert kind is g.Table
    assert (node.inputs, node.output, tensors["y"].low) == (("x",), "y", 3)
    real = (np.arange(-128, 128) + 1) * 0.25
    wanted = np.maximum(np.round(np.tanh(real) / 0.5) + 3, 3)
    np.testing.assert_array_equal(node.table, wanted)
    assert node.table.dtype == np.int8


def test_a_repeated_factor_is_read_before_it_is_repeated():
    gate = forms.Codes(jnp.zeros((1, 2), jnp.int8), OTHER, ("gate",))
    repeat = operation(
        "broadcast_in_dim", lambda x: jnp.broadcast_to(x, (1, *SHAPE)), broadcast_dimensions=(0, 3)
    )
    repeated = forms.Codes(repeat.bind(gate.codes), OTHER, moved=(repeat, gate))
    tensor = {"name": "gate", "shape": (2,), "low": -128, "high": 127}
    ((move, reshape), (kind, node)), _ = emitted(forms.Times(codes(), repeated), gate=tensor)
    assert (move, reshape.shape, reshape.inputs) == (g.Move, (1, 1, 2), ("gate",))
    assert (kind, node.inputs) == (g.Multiply, ("x", reshape.output))
    assert node.multiplier == 0.25 * 0.25 / 0.5
