"""Networks of models with several inputs: arguments, keywords, dictionaries of arrays."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import others_long
from references import integer_graph, sqnr

import jaxqat
from jaxqat.errors import ConversionError, ExecutionError, ExportError
from jaxqat.export import export_certificate
from jaxqat.integer import graph as g

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
F = np.float32
BATCH = 6
STATE, ACTION = RNG.normal(size=(BATCH, 8)).astype(F), RNG.normal(size=(BATCH, 3)).astype(F)
ONE, OTHER = (RNG.normal(size=(BATCH, 8, 8, 3)).astype(F) for _ in range(2))
TOKENS = RNG.integers(0, 11, (BATCH, 5)).astype(np.int32)
SEEN = RNG.random((BATCH, 1, 1, 5)) < 0.7
SEEN[..., 0] = True
CLASSES = RNG.integers(0, 4, BATCH).astype(np.int32)
NOISE = RNG.normal(size=(BATCH, 6)).astype(F)
PIXELS = RNG.integers(0, 256, (BATCH, 8, 8, 3)).astype(np.uint8)


class Critic(nn.Module):
    """The value of an action in a state: a sum of two dense layers."""

    @nn.compact
    def __call__(self, state, action):
        x = nn.relu(nn.Dense(16, name="state")(state) + nn.Dense(16, name="action")(action))
        return nn.Dense(1, name="head")(nn.relu(nn.Dense(16, name="hidden")(x)))


class Joined(nn.Module):
    """Both inputs side by side in one dense layer."""

    @nn.compact
    def __call__(self, state, action):
        x = jnp.concatenate([state, action], -1)
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(16, name="first")(x)))


class Twins(nn.Module):
    """One convolution for two images."""

    @nn.compact
    def __call__(self, pair):
        conv, head = nn.Conv(8, (3, 3), name="conv"), nn.Dense(5, name="head")
        left, right = (nn.relu(conv(pair[side])).mean((1, 2)) for side in ("left", "right"))
        return {"score": head(left * right), "left": left}


class Reader(nn.Module):
    """An encoder of tokens, with a mask of those to attend to by keyword."""

    @nn.compact
    def __call__(self, tokens, *, mask=None):
        x = nn.Embed(11, 12, name="embed")(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x, mask=mask)
        return nn.Dense(3, name="head")(x.mean(1))


class Generator(nn.Module):
    """Images of noise and a class."""

    @nn.compact
    def __call__(self, noise, classes):
        x = nn.relu(nn.Dense(64, name="noise")(noise) * nn.Embed(4, 64, name="embed")(classes))
        return nn.tanh(nn.ConvTranspose(3, (4, 4), (2, 2), name="up")(x.reshape(-1, 4, 4, 4)))


class Tempered(nn.Module):
    """The second input is read by float operations alone."""

    @nn.compact
    def __call__(self, x, temperature):
        logits = nn.Dense(4, name="head")(nn.relu(nn.Dense(16, name="first")(x)))
        return jax.nn.softmax(logits / temperature[:, None])


class Camera(nn.Module):
    """A uint8 image, scaled inside, beside numbers."""

    @nn.compact
    def __call__(self, image, state):
        x = nn.relu(nn.Conv(8, (3, 3), (2, 2), name="conv")(image.astype(jnp.float32) / 255))
        x = nn.Dense(16, name="image")(x.reshape(len(x), -1)) + nn.Dense(16, name="state")(state)
        return nn.Dense(3, name="head")(nn.relu(x))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, arguments of its call, and what its network's inputs are."""

    model: nn.Module
    arguments: tuple[Any, ...]
    places: list
    types: list
    keywords: dict = dataclasses.field(default_factory=dict)
    islands: bool = False

    @property
    def batch(self) -> Any:
        """The arguments as one batch."""
        first, *others = self.arguments
        return self.arguments if others else first


FLOATS = ["float32", "float32"]
CASES = {
    "critic": Case(Critic(), (STATE, ACTION), [(0,), (1,)], FLOATS),
    "joined": Case(Joined(), (STATE, ACTION), [(0,), (1,)], FLOATS),
    "twins": Case(
        Twins(), ({"left": ONE, "right": OTHER},), [(0, "left"), (0, "right")], FLOATS
    ),
    "reader": Case(
        Reader(), (TOKENS,), [(0,), ("mask",)], ["int32", "bool"], {"mask": SEEN}, islands=True
    ),
    "generator": Case(
        Generator(), (NOISE, CLASSES), [(0,), (1,)], ["float32", "int32"], islands=True
    ),
    "tempered": Case(
        Tempered(), (STATE, np.linspace(0.5, 2, BATCH, dtype=F)), [(0,), (1,)], FLOATS,
        islands=True,
    ),
    "camera": Case(Camera(), (PIXELS, STATE), [(0,), (1,)], ["uint8", "float32"]),
}  # fmt: skip


def converted(case):
    variables = case.model.init(jax.random.key(0), *case.arguments, **case.keywords)
    batch = case.batch
    model = jaxqat.calibrate(case.model, variables, batches=[batch], **case.keywords)
    few, named = (jax.tree.map(lambda x: x[:2], x) for x in (case.arguments, case.keywords))
    return variables, model, jaxqat.convert(model, *few, **named)


@pytest.mark.parametrize("name", others_long(CASES, {"critic", "twins", "reader", "camera"}))
def test_every_way_of_computing_reads_all_inputs(name, tmp_path):
    case = CASES[name]
    variables, model, graph = converted(case)
    assert [each.path for each in graph.inputs] == case.places
    assert [each.type for each in graph.inputs] == case.types
    assert bool(graph.islands) == case.islands
    batch = case.batch
    check = jaxqat.verify(model, graph=graph, batches=[batch])
    assert (check.differing, check.failures) == (0, ())
    assert check.codes + check.island_codes and check.images == BATCH

    arrays = tuple(jax.tree.leaves((case.arguments, case.keywords)))
    codes, result = integer_graph.run(graph, arrays)
    restored = jaxqat.load(jaxqat.save(graph, tmp_path / "network"))
    assert restored.inputs == graph.inputs
    executor = jaxqat.make_executor(restored)
    own = executor(*case.arguments, **case.keywords)
    if not case.islands:
        for platform in ("cpu", "tpu"):
            network = jaxqat.make_executor(restored, platform=platform)
            found = network.codes(*case.arguments, **case.keywords)
            for key, wanted in codes.items():
                np.testing.assert_array_equal(found[key], wanted, err_msg=f"{platform} {key}")
    program = jaxqat.load_stablehlo(
        jaxqat.export_stablehlo(graph, tmp_path / "n.shlo", platforms=["cpu"])
    )
    from jaxqat.export._onnx.runtime import make_runner

    path = jaxqat.export_onnx(graph, tmp_path / "n.onnx")
    file, exported = make_runner(path, expose=True)(batch, **case.keywords)
    exact = case.model.apply(variables, *case.arguments, **case.keywords)
    for other in (result, program(*case.arguments, **case.keywords), file):
        for one, two in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
            if case.islands:  # A last bit of an island can change a code.
                assert sqnr.decibels(one, two) > 50
            else:
                np.testing.assert_array_equal(one, two)
    if not case.islands:
        for key, wanted in codes.items():
            np.testing.assert_array_equal(exported[key], wanted, err_msg=key)
    for one, real in zip(jax.tree.leaves(own), jax.tree.leaves(exact), strict=True):
        assert sqnr.decibels(real, one) > 20


def test_inputs_side_by_side_are_no_island():
    case = CASES["joined"]
    model = converted(case)[1]
    graph = jaxqat.convert(model, *case.arguments, strict=True)
    assert len(graph.inputs) == 2 and not graph.islands


def test_a_batch_in_chunks_is_computed_as_a_whole():
    case = CASES["critic"]
    graph = converted(case)[2]
    many = [np.tile(x, (50, 1)) for x in case.arguments]
    network = jaxqat.make_executor(graph, platform="cpu")
    np.testing.assert_array_equal(network(*many), np.tile(network(*case.arguments), (50, 1)))


def test_several_inputs_have_names_in_onnx_and_stablehlo_files(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = converted(CASES["reader"])[2]
    file = onnx.load(jaxqat.export_onnx(graph, tmp_path / "n.onnx"))
    assert [each.name for each in file.graph.input] == ["input_0", "input_mask"]
    path = jaxqat.export_stablehlo(graph, tmp_path / "n.shlo", platforms=["cpu"], batch=2)
    described = jaxqat.load_stablehlo(path).description
    assert described["inputs"] == [
        {"path": [0], "shape": [5], "dtype": "int32"},
        {"path": ["mask"], "shape": [1, 1, 5], "dtype": "bool"},
    ]


CALLS = {
    "too few": (
        (STATE,),
        {},
        "takes 2 arguments, those of the model that it reads, got 1 argument",
    ),
    "too many": ((STATE, ACTION, ACTION), {}, "got 3 arguments"),
    "a keyword": ((STATE,), {"action": ACTION}, "got 1 argument and action"),
    "another shape": (
        (STATE, STATE),
        {},
        r"input 1 must have the shape \(batch, 3\), got \(6, 8\)",
    ),
    "another batch": ((STATE, ACTION[:2]), {}, "one size of the batch, got {'0': 6, '1': 2}"),
    "another type": ((STATE, ACTION.astype(int)), {}, "input 1 must be float32"),
    "a dictionary": (({"x": STATE}, ACTION), {}, "argument 0 must be an array, got a dictionary"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_with_other_arguments_is_an_error_that_names_them(name, tmp_path):
    arguments, keywords, message = CALLS[name]
    graph = converted(CASES["critic"])[2]
    with pytest.raises(ExecutionError, match=message):
        jaxqat.make_executor(graph)(*arguments, **keywords)


def test_a_dictionary_without_a_key_is_an_error_that_names_it():
    network = jaxqat.make_executor(converted(CASES["twins"])[2])
    with pytest.raises(ExecutionError, match="argument 0 has no 'right', where the network reads"):
        network({"left": ONE})


NAMES = [
    ({"a": {"b": STATE}, "a/b": STATE + 1}, {}),
    ({"a_b": STATE, "a": {"b": STATE + 1}}, {}),
    (STATE, {"0": STATE + 1, "1": STATE + 2}),
]


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_places_that_read_alike_are_told_apart(number, tmp_path):
    first, named = NAMES[number]

    def function(params, x, **others):
        one, *rest = jax.tree.leaves((x, others))
        for factor, other in enumerate(rest, 2):
            one = jnp.concatenate([one, factor * other], -1)
        return one @ params[: one.shape[-1]]

    params = RNG.normal(size=(24, 4)).astype(F)
    bound = jaxqat.calibrate(
        jaxqat.quantize(function), {"params": params}, batches=[first], **named
    )
    graph = jaxqat.convert(bound, first)
    check = jaxqat.verify(bound, graph=graph, batches=[first])
    assert (check.differing, check.failures) == (0, ())
    expected = bound(first)
    network = jaxqat.make_executor(graph)
    np.testing.assert_allclose(network(first, **named), expected, rtol=1e-6)
    from jaxqat.export._onnx.runtime import make_runner

    run = make_runner(jaxqat.export_onnx(graph, tmp_path / "n.onnx"))
    np.testing.assert_allclose(run(first, **named)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("flag", [False, True])
def test_what_is_no_array_in_a_batch_stays_as_it_is(flag):
    def function(params, x, factor, negated):
        y = jax.nn.relu(x @ params["w"]) * factor
        return -y if negated else y

    params = {"w": RNG.normal(size=(8, 4)).astype(F)}
    batch = STATE, 2.5, flag
    bound = jaxqat.calibrate(jaxqat.quantize(function), {"params": params}, batches=[batch])
    graph = jaxqat.convert(bound, *batch)
    check = jaxqat.verify(bound, graph=graph, batches=[batch, batch])
    assert (check.differing, check.failures, check.images) == (0, (), 2 * BATCH)
    found = jaxqat.make_executor(graph)(STATE)
    assert sqnr.decibels(function(params, *batch), found) > 30


def test_an_equinox_module_is_mapped_over_arrays_by_keyword_too():
    eqx = pytest.importorskip("equinox")

    class Module(eqx.Module):
        layer: Any

        def __call__(self, x, *, gate=None):
            y = jax.nn.relu(self.layer(x))
            return y if gate is None else y * jax.nn.sigmoid(gate)

    module = Module(eqx.nn.Linear(8, 3, key=jax.random.key(0)))
    bound = jaxqat.calibrate(module, {"params": module}, batches=[STATE], gate=ACTION)
    graph = jaxqat.convert(bound, STATE)
    assert [each.path for each in graph.inputs] == [(0,), ("gate",)]
    check = jaxqat.verify(bound, graph=graph, batches=[STATE])
    assert (check.differing, check.failures) == (0, ())
    exact = jax.vmap(lambda x, gate: module(x, gate=gate))(STATE, ACTION)
    assert sqnr.decibels(exact, jaxqat.make_executor(graph)(STATE, gate=ACTION)) > 25


def test_files_refuse_batches_of_different_sizes(tmp_path):
    from jaxqat.export import run_onnx

    graph = converted(CASES["critic"])[2]
    path = jaxqat.export_onnx(graph, tmp_path / "n.onnx")
    program = jaxqat.load_stablehlo(
        jaxqat.export_stablehlo(graph, tmp_path / "n.shlo", platforms=["cpu"])
    )
    sizes = r"one size of the batch, got \{'0': 6, '1': 2\}"
    with pytest.raises(ExportError, match=sizes):
        run_onnx(path, (STATE, ACTION[:2]))
    with pytest.raises(ExportError, match=sizes):
        program(STATE, ACTION[:2])
    with pytest.raises(ExportError, match="a list is one argument, a tuple are several"):
        run_onnx(path, [STATE, ACTION])
    with pytest.raises(ExportError, match="input 0 must be float32"):
        program(STATE[:0], ACTION[:0])


def test_tokens_of_numpy_s_type_are_taken_and_too_large_ones_are_not(tmp_path):
    from jaxqat.export import run_onnx

    case = CASES["generator"]
    path = jaxqat.export_onnx(converted(case)[2], tmp_path / "n.onnx")
    wanted = run_onnx(path, case.arguments)[0]
    np.testing.assert_array_equal(run_onnx(path, (NOISE, CLASSES.astype(np.int64)))[0], wanted)
    with pytest.raises(ExportError, match=r"input 1 must be int32 .* got int64"):
        run_onnx(path, (NOISE, CLASSES + np.int64(2**32)))


def test_a_mask_must_be_bool():
    case = CASES["reader"]
    network = jaxqat.make_executor(converted(case)[2])
    with pytest.raises(ExecutionError, match="input mask must be bool, got float32"):
        network(TOKENS, mask=SEEN.astype(F))
    with pytest.raises(ExecutionError, match=r"takes 1 argument and mask, .* got 1 argument"):
        network(TOKENS)


def test_an_argument_that_the_network_does_not_read_is_no_input():
    def function(params, x, unread, y):
        return x @ params["w"] + y @ params["w"]

    params = {"w": RNG.normal(size=(8, 4)).astype(F)}
    batch = STATE, jax.random.key(0), 2 * STATE
    bound = jaxqat.calibrate(jaxqat.quantize(function), {"params": params}, batches=[batch])
    graph = jaxqat.convert(bound, *batch)
    assert [each.path for each in graph.inputs] == [(0,), (2,)]
    network = jaxqat.make_executor(graph)
    result = network(STATE, None, 2 * STATE)
    # The sum of two products of one sign is computed in float: a rounding of each, and one of it.
    np.testing.assert_allclose(result, bound(*batch), rtol=2**-22, atol=2**-22)
    check = jaxqat.verify(bound, graph=graph, batches=[batch])
    assert (check.differing, check.failures) == (0, ())


@pytest.mark.parametrize("shape", [(), (5, 5)], ids=["a number", "a mask of all examples"])
def test_an_input_without_a_batch_is_refused_with_what_to_do(shape):
    def function(params, x, shared):
        return x @ params["w"] * shared.sum()

    params = {"w": RNG.normal(size=(8, 4)).astype(F)}
    batch = STATE, np.ones(shape, F)
    bound = jaxqat.calibrate(jaxqat.quantize(function), {"params": params}, batches=[batch])
    with pytest.raises(ConversionError, match=r"the input 1 of the shape .* make it a constant"):
        jaxqat.convert(bound, *batch)


def test_what_is_for_one_input_says_so(tmp_path):
    case = CASES["critic"]
    _, model, graph = converted(case)
    with pytest.raises(ConversionError, match=r"preprocess makes one input .* this model has 2"):
        jaxqat.convert(model, *case.arguments, preprocess=lambda x: x)
    with pytest.raises(ExportError, match="and the network reads 2: 0, 1"):
        export_certificate(graph, tmp_path / "certificate", STATE)
    with pytest.raises(g.GraphError, match=r"reads 2 arrays \(0, 1\), not one"):
        _ = graph.input
