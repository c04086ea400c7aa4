"""Every float operation gives the numbers of NumPy, also with another size of the batch."""

import numpy as np
import pytest
from integer.float_cases import CASES, Case, N
from references import float_ops

import jaxqat
from jaxqat.integer import graph as g
from jaxqat.integer._convert.float_attributes import ENCODERS
from jaxqat.integer._execute.float_ops import _OPERATIONS, evaluate
from jaxqat.integer._nodes.float_op import OPERATIONS, at_batch

# Of masks, of which there is no input.
MASKS = {"not", "and", "or", "xor", "reduce_and", "reduce_or"}


def expected(case: Case, x: np.ndarray) -> np.ndarray:
    attributes = {key: at_batch(value, len(x)) for key, value in case.attributes.items()}
    wide = x.astype(np.float64) if x.dtype == np.float32 else x
    operands = [wide if c is None else np.asarray(c) for c in case.constants]
    return float_ops.evaluate(case.operation, attributes, operands)


def assert_close(found, wanted, dtype: str) -> None:
    found = np.asarray(found)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    if dtype == "float32":
        # A dozen roundings of float32 at most, in sums of up to 36 terms.
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.reads])
def test_an_operation_gives_the_numbers_of_numpy_for_any_batch(name):
    case = CASES[name]
    x = case.input()
    for count in (N, 1, 2):
        if case.output is not None and case.output[0] != {"batch": 1}:
            continue
        found = jaxqat.make_executor(case.graph(), platform="tpu")(x[:count])
        assert_close(found, expected(case, x[:count]), case.dtype)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.operation not in MASKS])
def test_an_operation_alone_gives_the_numbers_of_numpy(name):
    case = CASES[name]
    x = case.input()
    found = evaluate(case.node(), [x] * case.reads, N)
    assert_close(found, expected(case, x), case.dtype)


@pytest.mark.parametrize("operation", sorted(MASKS - {"not"}))
def test_operations_on_masks_give_those_of_numpy(operation):
    rng = np.random.default_rng(0)
    masks = [rng.random((3, 4)) > 0.5 for _ in range(2)]
    attributes = {"axes": [1]} if operation.startswith("reduce") else {}
    masks = masks[:1] if attributes else masks
    node = g.FloatOp(
        name="op", inputs=("a", "b")[: len(masks)], output="y", operation=operation,
        attributes=attributes, constants=(None,) * len(masks), shape=[{"batch": 1}], dtype="bool",
    )  # fmt: skip
    found = np.asarray(evaluate(node, masks, 3))
    np.testing.assert_array_equal(found, float_ops.evaluate(operation, attributes, masks))


def test_every_operation_is_tested_executed_and_made():
    tested = {case.operation for case in CASES.values()} | MASKS
    assert tested == set(OPERATIONS) == set(_OPERATIONS)
    made = {operation for operation, _ in ENCODERS.values()}
    assert made == set(OPERATIONS)


@pytest.mark.parametrize("name", ["dot", "conv", "reduce_sum", "broadcast"])
def test_batches_beyond_a_chunk_give_the_same_numbers(name):
    """On a CPU, a batch runs in chunks, the last of them filled up."""
    case = CASES[name]
    x = np.concatenate([case.input() * factor for factor in range(1, 8)])
    found = jaxqat.make_executor(case.graph(), platform="cpu")(x)
    wanted = expected(case, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
