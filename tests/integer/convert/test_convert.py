"""What the integer network computes is what the quantized model computed in training.

The integer side is evaluated by the interpreter in NumPy (`references.integer_graph`).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer import models
from integer.models import CLASSES, MODELS, WEIGHTS, assert_same, calibrated, conv, inputs, trained
from plain import others_long
from references import integer_graph, integers, sqnr

import jaxqat
from jaxqat import ConversionError
from jaxqat.integer import graph as g

pytestmark = pytest.mark.slow

relu = jax.nn.relu

RECIPES = ["int8", "int8_symmetric"]


@functools.cache
def example(name, recipe):
    """A model, quantized and calibrated, and its integer network."""
    model = trained(MODELS[name], recipe)
    return model, model.convert()


def products(graph):
    return {node.name: node for node in graph.products()}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_codes_and_logits_are_those_of_the_training_graph(name, recipe):
    model, graph = example(name, recipe)
    codes, logits = integer_graph.run(graph, inputs(5, seed=1))
    assert_same(model(inputs(5, seed=1)), (codes, logits), every=False)
    # The comparison says something only if codes vary.
    assert all(len(np.unique(values)) > 8 for values in codes.values())


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("name", ["vgg", "mobile", "residual"])
def test_the_batch_size_makes_no_difference(name, batch):
    """Each batch size is a program of its own."""
    model, graph = example(name, "int8")
    images = inputs(batch, seed=2)
    assert_same(model(images), integer_graph.run(graph, images), every=False)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", others_long(RECIPES, ["int8"]))
def test_resnet18_s_codes_and_logits_are_those_of_the_training_graph(recipe):
    images = inputs(5, (16, 16, 3))
    model = trained(models.resnet18(), recipe, images=images)
    codes = integer_graph.run(model.convert((16, 16, 3)), images)
    assert_same(model(images), codes, every=False)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["mobile", "inception"])
def test_every_multiplier_is_the_float32_quotient_of_its_scales(name, recipe):
    _, graph = example(name, recipe)
    for node in graph.products():
        unit = np.float32(graph.tensors[node.inputs[0]].scale * node.weight_scale)
        output = graph.tensors.get(node.output)
        expected = unit if output is None else np.float32(unit / output.scale)
        np.testing.assert_array_equal(node.multiplier, expected)
    for node in graph.nodes:
        if isinstance(node, g.Add):
            scales = [graph.tensors[name].scale for name in node.inputs]
            quotients = [float(s / graph.tensors[node.output].scale) for s in scales]
            # As many bits as the sum leaves: the next power of two would reach 2**16.
            assert (1 + sum(quotients)) * 2**node.shift < 2**16
            assert node.shift == 15 or (1 + sum(quotients)) * 2 ** (node.shift + 1) >= 2**16
            assert list(node.factors) == [round(q * 2**node.shift) for q in quotients]


@pytest.mark.parametrize("recipe", RECIPES)
def test_batch_norm_is_folded_whatever_the_sign_of_gamma(recipe):
    """Against float64: its factor is in the scale, its sign in the codes, the rest in the bias."""
    model, graph = example("residual", recipe)
    params, stats = model.variables["params"], model.variables["batch_stats"]
    for layer, norm in (("stem", "norm0"), ("conv1", "norm1"), ("conv2", "norm2")):
        node, kernel = products(graph)[layer], params[layer]["kernel"]
        gamma, beta = (params[norm][k].astype(np.float64) for k in ("scale", "bias"))
        mean, var = (stats[norm][k].astype(np.float64) for k in ("mean", "var"))
        assert gamma.min() < 0 and (gamma == 0).any() and gamma.max() > 0
        used = gamma != 0
        codes, scale = integers.weight_codes(kernel)
        np.testing.assert_array_equal(node.weights, np.sign(gamma).astype(int) * codes)

        factor = gamma / np.sqrt(var + 1e-5)
        real_scale = np.abs(factor) * scale
        # A handful of float32 roundings: the scale, 1 / sqrt, gamma, the product.
        np.testing.assert_allclose(node.weight_scale[used], real_scale[used], rtol=8 * 2**-24)
        unit = graph.tensors[node.inputs[0]].scale * node.weight_scale
        offset = beta - mean * factor
        # Half a unit, and the same roundings on biases of at most a few thousand units.
        assert (np.abs(node.bias - offset / unit)[used] < 0.501).all()
        # A channel without gain is the constant beta: one accumulator unit or its negative.
        assert set(node.bias[~used]) <= {-1, 1}
        np.testing.assert_allclose((node.bias * unit)[~used], beta[~used], rtol=2**-22)


def test_a_border_is_of_real_zeros_wherever_the_zero_point_is():
    """Images far from zero, padded by the convolution or by the hand that makes the images."""
    images = inputs(4) + np.float32(1.5)
    padded = np.pad(images, ((0, 0), (1, 2), (1, 1), (0, 0)))
    window = {"kernel": np.random.default_rng(0).normal(size=(3, 3, 3, 4)).astype(np.float32)}

    class One(nn.Module):
        padding: str | tuple[tuple[int, int], ...]

        @nn.compact
        def __call__(self, x, train):
            return nn.Conv(4, (3, 3), padding=self.padding, use_bias=False, name="conv")(x)

    graphs = []
    for padding, data in ((((1, 2), (1, 1)), images), ("VALID", padded)):
        model = jaxqat.quantize(One(padding), "int8")
        variables = model.init_quant({"params": {"conv": window}}, data, train=False)
        variables = model.calibrate(variables, padded[:, 1:-1, 1:-1], train=False)
        graphs.append(jaxqat.convert(model, variables, data, train=False))
    assert -128 <= graphs[0].tensors["conv/input"].zero_point < -60
    _, by_conv = integer_graph.run(graphs[0], images)
    _, by_hand = integer_graph.run(graphs[1], padded)
    np.testing.assert_array_equal(by_conv, by_hand)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_pixel_value_is_looked_up_as_the_training_graph_computes_it(recipe):
    mean, deviation = np.array([[0.49, 0.48, 0.45], [0.25, 0.24, 0.26]], np.float32)

    def normalize(pixels):
        return (pixels.astype(jnp.float32) / 255 - mean) / deviation

    values = np.random.default_rng(0).permuted(np.tile(np.arange(256), (3, 1)), axis=1)
    pixels = values.T.reshape(4, 8, 8, 3).astype(np.uint8)
    model = trained(MODELS["mobile"], recipe, images=np.asarray(normalize(pixels)))
    graph = model.convert(preprocess=normalize)

    @jax.jit
    def train(variables, pixels):
        evaluator = model.model.record(variables, normalize(pixels), train=False)
        codes = {"/".join(key): codes.codes for key, codes in evaluator.codes.items()}
        return codes, evaluator.results[0]

    found = train(model.variables, pixels)
    assert_same(found, integer_graph.run(graph, pixels), every=False)
    table = graph.quantize.table
    assert table is not None and table.shape == (256, 3) and table.dtype == np.int8
    assert (np.diff(table.astype(int), axis=0) >= 0).all()  # Brighter pixels, larger codes.
    assert model.convert().quantize.table is None


def test_fixed_point_is_a_way_to_execute_the_same_graph():
    _, graph = example("residual", "int8")
    other = example("residual", "int8")[0].convert(requantization="fixed_point")
    assert (graph.requantization, other.requantization) == ("float", "fixed_point")
    for one, two in zip(graph.nodes, other.nodes, strict=True):
        assert type(one) is type(two)
        jax.tree.map(np.testing.assert_array_equal, vars(one), vars(two))
    with pytest.raises(ConversionError, match="must be one of float, fixed_point, got 'integer'"):
        example("residual", "int8")[0].convert(requantization="integer")


def test_metadata_is_kept_and_shapes_are_told():
    names = [str(number) for number in range(models.CLASSES)]
    graph = example("residual", "int8")[0].convert(metadata={"labels": names})
    assert graph.metadata == {"labels": names}
    assert (graph.input_shape, graph.output_shape) == ((8, 8, 3), (models.CLASSES,))
    shapes = {name: tensor.shape for name, tensor in graph.tensors.items()}
    codes, _ = integer_graph.run(graph, inputs(1))
    assert shapes == {name: values.shape[1:] for name, values in codes.items()}


def converted(function, **options):
    """The integer network of a function, its codes and result, and those of the training graph."""
    model, variables = calibrated(function)
    graph = jaxqat.convert(model, variables, inputs(1), **options)

    @jax.jit
    def train(ranges, images):
        evaluator = model.record({"params": WEIGHTS, "quant": ranges}, images)
        codes = {"/".join(key): codes.codes for key, codes in evaluator.codes.items()}
        return codes, evaluator.results[0]

    return graph, integer_graph.run(graph, inputs(5)), train(variables["quant"], inputs(5))


def test_a_layer_that_is_used_twice_makes_two_nodes():
    def model(p, x):
        x = relu(conv(x, p["a"]))
        return relu(conv(relu(conv(x, p["b"])), p["b"])).mean((1, 2)) @ p["head"]

    graph, actual, expected = converted(model)
    assert list(products(graph)) == ["a", "b", "b#2", "head"]
    assert_same(expected, actual, every=False)


def test_the_result_may_be_codes_and_what_it_does_not_need_is_left_out():
    def model(p, x):
        y = relu(conv(x, p["a"]))
        conv(relu(conv(y, p["b"])), p["b"])  # It makes y a quantized tensor.
        return y

    graph, actual, expected = converted(model)
    assert list(products(graph)) == ["a"]
    assert graph.output.name == "b/input" and graph.output_shape == (8, 8, 8)
    assert_same(actual, expected, every=False)


def test_clippings_that_do_not_overlap_are_one_behind_the_other():
    def model(p, x):
        x = jnp.minimum(jnp.maximum(conv(x, p["a"]), 0.5), 0.25)
        return (x.mean((1, 2))) @ p["head"]

    _, actual, expected = converted(model)
    assert_same(expected, actual, every=False)


@pytest.mark.parametrize("padded_first", [False, True])
def test_a_clipping_above_zero_clips_a_border_only_if_it_comes_behind_it(padded_first):
    def model(p, x):
        def pad(x):
            return jnp.pad(x, ((0, 0), (1, 2), (1, 1), (0, 0)))

        def clip(x):
            return jnp.clip(x, 0.25, 1.0)

        x = conv(x, p["a"])
        x = clip(pad(x)) if padded_first else pad(clip(x))
        return relu(conv(x, p["b"], "VALID")).mean((1, 2)) @ p["head"]

    _, (codes, result), expected = converted(model)
    assert_same(expected, (codes, result), every=False)


def test_sums_beyond_float32_are_the_training_graph_s_too():
    """3,000 products of large codes: above 2**24 not every sum is a float32."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.uniform(0.9, 1, (3000, 8)).astype(np.float32)}
    images = rng.uniform(0.8, 1, (64, 3000)).astype(np.float32)
    model = jaxqat.quantize(lambda p, x: x @ p["w"])
    variables = model.calibrate({"params": weights}, images)
    graph = jaxqat.convert(model, variables, images)
    codes, result = integer_graph.run(graph, images)
    node = next(graph.products())
    steps = codes["w/input"].astype(int) - graph.tensors["w/input"].zero_point
    assert (integer_graph.product(node, steps) > 2**24).all()
    trained_codes = {"w/input": model.codes(variables, images)["w/input"]}
    assert_same((trained_codes, jax.jit(model.apply)(variables, images)), (codes, result))


def test_a_mirrored_border_is_moved_codes():
    def model(p, x):
        x = jnp.pad(relu(conv(x, p["a"])), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        return relu(conv(x, p["b"], "VALID")).mean((1, 2)) @ p["head"]

    _, actual, expected = converted(model)
    assert_same(expected, actual, every=False)


class Heads(nn.Module):
    """Dense layers over several axes, each output with a bias and a factor of its own."""

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.normal(1.0)
        x = nn.DenseGeneral((3, 4), bias_init=bias, name="apart")(x)
        factor = self.param("factor", nn.initializers.normal(1.0), (3, 4))
        x = relu(jnp.swapaxes(x * factor, -1, -2))
        return nn.DenseGeneral(CLASSES, axis=(-2, -1), bias_init=bias, name="together")(x)


def test_a_bias_for_each_of_several_output_axes_is_part_of_the_product():
    x = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    variables = Heads().init(jax.random.key(0), x)
    model = jaxqat.calibrate(Heads(), variables, batches=[x])
    graph = jaxqat.convert(model, x, strict=True)
    apart, _ = graph.products()
    assert len(np.unique(apart.bias)) == 12 and len(np.unique(apart.multiplier)) == 12
    check = jaxqat.verify(model, graph=graph, batches=[x])
    assert (check.differing, check.failures) == (0, ())
    _, result = integer_graph.run(graph, x)
    # Three quantized tensors of 8 bits.
    assert sqnr.decibels(Heads().apply(variables, x), result) > 30


def test_a_padded_tensor_between_layers_is_stored(tmp_path):
    """JAX's parameters of it are NumPy integers."""
    x = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    params = {name: np.eye(8, dtype=np.float32) for name in "ab"}

    def padded(p, x):
        return jnp.pad(relu(x @ p["a"]), ((0, 0), (1, 2), (0, 0)))[:, ::2] @ p["b"]

    model = jaxqat.calibrate(padded, {"params": params}, batches=[x])
    graph = jaxqat.load(jaxqat.save(jaxqat.convert(model, x), tmp_path / "network"))
    assert any(isinstance(node, g.Move) and node.kind == "pad" for node in graph.nodes)
    check = jaxqat.verify(model, graph=graph, batches=[x])
    assert (check.differing, check.failures) == (0, ())
