"""verify counts exactly what differs, by an independent count in NumPy."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from integer.models import MODELS, inputs, trained
from references import integer_graph

import jaxqat
from jaxqat.integer._compare import Observation, TensorCheck, Verification, compare
from jaxqat.integer._execute.executor import make_executor

IMAGES = inputs(12, seed=1)


@functools.cache
def example():
    model = trained(MODELS["mlp"])
    return model, model.convert()


@functools.cache
def verified(*changed):
    """The verification of the integer network, with a change to a field of a node."""
    model, graph = example()
    for name, field, change in changed:
        graph = tampered(graph, name, field, change)
    return jaxqat.verify(
        model.model, model.variables, graph=graph, batches=[IMAGES[:8], IMAGES[8:]], train=False
    )


def tampered(graph, name, field, change):
    """The graph with one number of a layer changed: that of output channel 2."""
    nodes = []
    for node in graph.nodes:
        if node.name == name:
            array = getattr(node, field).copy()
            array[..., 2] = change(array[..., 2])
            node = dataclasses.replace(node, **{field: array})
        nodes.append(node)
    return dataclasses.replace(graph, nodes=tuple(nodes))


@pytest.mark.slow
def test_the_network_as_converted_keeps_the_contract():
    found = verified()
    _, graph = example()
    assert found.failures == () and found.differing == found.largest == found.top1_flips == 0
    # Every tensor of the training graph, and every code of every image, in the graph's order.
    sizes = {n: 12 * int(np.prod(t.shape)) for n, t in graph.tensors.items() if "input" in n}
    sizes = {n: size for n, size in sizes.items() if n.endswith("input")}
    assert [(t.name, t.codes) for t in found.tensors] == list(sizes.items())
    assert found.images == 12 and found.codes == sum(sizes.values())


def test_the_printed_form_has_the_counts_and_the_broken_contract():
    tensors = (TensorCheck("a", 2000, 3, 2, None), TensorCheck("b", 1000, 0, 0, None))
    lines = str(Verification(tensors, 50, 1, None)).splitlines()
    assert lines[0] == "3 of 3,000 codes differ; 1 of 50 images change their class"
    assert [line.split(":")[0] for line in lines[1:]] == ["broken contract"] * 3
    assert len(str(verified()).splitlines()) == 1


def plus_forty(values):
    return values + 40


def halved(values):
    return values * np.float32(0.5)


def negated(values):
    return -values


TAMPERED = [
    ("dense1", "bias", plus_forty),
    ("dense1", "multiplier", halved),
    ("dense1", "weights", negated),
    ("dense2", "bias", plus_forty),
    ("head", "weights", negated),
]


@pytest.mark.parametrize("change", TAMPERED, ids=lambda c: f"{c[0]}.{c[1]}")
def test_a_change_to_one_channel_is_counted_code_by_code(change):
    _, graph = example()
    right, right_logits = integer_graph.run(graph, IMAGES)
    wrong, wrong_logits = integer_graph.run(tampered(graph, *change), IMAGES)
    found = verified(change)
    for check in found.tensors:
        difference = np.abs(right[check.name].astype(int) - wrong[check.name])
        assert check.differing == np.count_nonzero(difference), check.name
        assert check.largest == difference.max(), check.name
    flips = (right_logits.argmax(-1) != wrong_logits.argmax(-1)).sum()
    assert found.top1_flips == flips
    changed = found.differing or found.top1_flips
    assert changed and found.failures
    assert found.differing or change[0] == "head"
    different = right_logits != wrong_logits
    assert (found.results, found.differing_results) == (different.size, np.sum(different))


def test_a_last_layer_that_changes_no_class_is_found_by_its_results():
    """One unit more of a bias: no code and no class says so."""
    found = verified(("head", "bias", lambda values: values + 1))
    assert found.differing == found.top1_flips == 0
    _, graph = example()
    *_, head = graph.products()
    unit = np.float64(head.multiplier[2])
    # The difference of two float32 logits of some units of 10: two roundings of 2**-20 at most.
    assert abs(found.largest_result_difference - unit) < 2**-19
    (failure,) = found.failures
    assert found.unexplained_results == found.differing_results > 0
    assert f"{found.differing_results} of {found.results} results differ in images" in failure
    assert "the last layer differs" in failure


def observed(codes, logits):
    """A network of these codes in the first tensor of the graph, and these results."""
    name = next(iter(example()[1].tensors))
    return lambda _: Observation({name: codes}, [logits])


def test_a_differing_code_explains_the_results_of_its_own_image_only():
    codes, logits = np.zeros((40, 3000), np.int8), np.zeros((40, 1), np.float32)
    other, image_7, more = codes.copy(), logits.copy(), logits.copy()
    other[7, 5], image_7[7], more[[3, 7, 9]] = 1, 2.0, 5.0
    _, graph = example()

    def found(logits):
        images = np.zeros((40, 1), np.float32)
        return compare(observed(codes, 0 * logits), observed(other, logits), graph, [images])

    explained, broken = found(image_7), found(more)
    assert (explained.differing, explained.differing_results) == (1, 1)
    assert (explained.unexplained_results, explained.failures) == (0, ())
    assert (broken.differing_results, broken.unexplained_results) == (3, 2)
    (failure,) = broken.failures
    assert failure.startswith("2 of 40 results differ in images whose codes are equal")


def test_results_of_another_shape_differ():
    codes, images = np.zeros((4, 3), np.int8), np.zeros((4, 1), np.float32)
    one, four = (observed(codes, np.ones((n, 1), np.float32)) for n in (1, 4))
    found = compare(four, one, example()[1], [images])
    assert (found.results, found.unexplained_results) == (4, 4)
    assert found.failures and found.largest_result_difference == np.inf


def test_nan_in_the_input_is_counted_and_makes_no_difference():
    model, graph = example()
    images = IMAGES.copy()
    images[0, 0, 0, 0] = images[9, 1, 2] = np.nan
    found = jaxqat.verify(
        model.model, model.variables, graph=graph, batches=[images[:8], images[8:]], train=False
    )
    assert found.nan_inputs == 1 + images.shape[-1]
    assert (found.differing, found.differing_results, verified().nan_inputs) == (0, 0, 0)


def test_the_failures_name_the_counts_and_the_worst_tensor():
    found = verified(("dense1", "weights", negated))
    text = "; ".join(found.failures)
    assert f"{found.differing} of {found.codes} codes differ, the contract is fewer than 1" in text
    worst = max(found.tensors, key=lambda t: t.largest)
    assert worst.largest > 1
    assert f"{worst.name}: a code differs by {worst.largest}, the contract is 1" in text


def test_flips_are_counted_against_training_and_against_the_float_model():
    """With one class always on top, an image flips if any other was."""

    def most(values):
        return values + 2**29

    model, graph = example()
    found = verified(("head", "bias", most))
    plain = {name: values for name, values in model.variables.items() if name != "quant"}
    real = np.asarray(MODELS["mlp"].apply(plain, IMAGES, train=False))
    _, logits = integer_graph.run(graph, IMAGES)
    assert found.top1_flips == (logits.argmax(-1) != 2).sum() > 0
    assert found.top1_flips_fp32 == (real.argmax(-1) != 2).sum() > 0
    assert f"{found.top1_flips} of 12 images change their class" in found.failures
    assert found.differing == 0  # The head's result is real; no codes come of it.


def test_signal_to_noise_is_that_of_the_float_tensors():
    """The float network by hand, in float64: x, relu(x w + b), its product with the next."""
    model, graph = example()
    layers = model.variables["params"]
    x = IMAGES.reshape(12, -1).astype(np.float64)
    real = {"dense1/input": x.reshape(IMAGES.shape)}
    real["dense2/input"] = np.maximum(x @ layers["dense1"]["kernel"] + layers["dense1"]["bias"], 0)
    real["head/input"] = (
        real["dense2/input"] @ layers["dense2"]["kernel"] + layers["dense2"]["bias"]
    )
    codes, _ = integer_graph.run(graph, IMAGES)
    found = {check.name: check.sqnr_db for check in verified().tensors}
    assert found.keys() == real.keys()
    for name, values in real.items():
        tensor = graph.tensors[name]
        noise = values - (codes[name].astype(float) - tensor.zero_point) * float(tensor.scale)
        expected = 10 * np.log10((values**2).sum() / (noise**2).sum())
        assert 10 < expected < 60  # Some values of these images lie outside of the ranges.
        # float32 sums of 200 terms err by less than 200 * 2**-24 of the signal's size, 1.2e-5. At
        # 60 dB the noise is 1e-3 of it: a hundredth part of it is 0.1 dB.
        assert abs(found[name] - expected) < 0.1


def test_each_network_s_classes_are_compared_with_the_integer_network_s():
    """Of four images the float network differs in all, training in one."""
    _, graph = example()

    def network(classes):
        return lambda _: Observation({}, [np.eye(5)[classes]])

    real, training, integers = network([1, 0, 3, 4]), network([0, 1, 1, 3]), network([0, 1, 2, 3])
    found = compare(training, integers, graph, [np.zeros(4)], real)
    assert (found.top1_flips, found.top1_flips_fp32) == (1, 4)
    assert compare(training, integers, graph, [np.zeros(4)] * 3).top1_flips == 3
    assert compare(training, integers, graph, [np.zeros(4)]).top1_flips_fp32 is None


@pytest.mark.slow
def test_preprocessing_is_the_training_graph_s_part_only():
    model, _ = example()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)

    def preprocess(pixels):
        return pixels.astype(jax.numpy.float32) / 100 - 1

    graph = model.convert(preprocess=preprocess)
    options = {"graph": graph, "batches": [pixels], "preprocess": preprocess, "train": False}
    found = jaxqat.verify(model.model, model.variables, **options)
    assert found.failures == () and found.images == 4
    tpu = make_executor(graph, platform="tpu")
    assert jaxqat.verify(model.model, model.variables, executor=tpu, **options) == found


def test_networks_that_share_no_tensor_are_no_proof():
    model, graph = example()
    found = jaxqat.verify(model.model, model.variables, graph=graph, batches=[], train=False)
    assert found.images == 0 and "no codes were compared" in found.failures[0]
    observed = Observation({"one": np.zeros((2, 3), np.int8)}, [np.eye(2)])
    other = Observation({"two": np.zeros((2, 3), np.int8)}, [np.eye(2)])
    found = compare(lambda _: observed, lambda _: other, graph, [np.zeros(2)])
    assert found.tensors == () and found.failures


def test_a_graph_with_another_number_of_results_is_refused():
    weights = {"w": np.ones((3, 2), np.float32)}
    x = np.ones((2, 8, 8, 3), np.float32)
    model = jaxqat.quantize(lambda p, x: (x @ p["w"], x))
    variables = model.calibrate({"params": weights}, x)
    with pytest.raises(
        jaxqat.ExecutionError, match="one of them returns 2 arrays, the integer network 1"
    ):
        jaxqat.verify(model, variables, graph=example()[1], batches=[x])


def verification(codes, differing, largest, flips=0):
    checks = (TensorCheck("a", codes - 10, 0, 0, 30.0), TensorCheck("b", 10, differing, largest, 9))
    return Verification(checks, 100, flips, None)


def test_the_contract_is_fewer_than_one_code_in_100000_and_by_one():
    assert verification(100_001, 1, 1).failures == ()
    assert verification(400_000, 3, 1).failures == ()
    (failure,) = verification(100_000, 1, 1).failures
    assert failure.startswith("1 of 100000 codes differ") and "1 in 100,000" in failure
    (failure,) = verification(300_000, 1, 2).failures
    assert failure == "b: a code differs by 2, the contract is 1"
    (failure,) = verification(300_000, 0, 0, flips=1).failures
    assert failure == "1 of 100 images change their class"
    assert len(verification(10, 5, 9, flips=3).failures) == 3


def test_totals_are_over_all_tensors():
    found = verification(50, 4, 3)
    assert (found.codes, found.differing, found.largest) == (50, 4, 3)
