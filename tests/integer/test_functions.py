"""Functions, gates, factors by channel, and products in any layout run on codes throughout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer.test_islands import PARAMS, X, calibrated, conv, head, network
from plain import others_long
from references import integer_graph, sqnr

import jaxqat
from jaxqat.integer import graph as g

pytestmark = pytest.mark.slow


def mish(x):
    return x * jnp.tanh(jax.nn.softplus(x))


def own_sigmoid(x):
    return 2 * x / (1 + jnp.exp(-1.702 * x))


def leaky(x):
    return jnp.where(x > 0, x, 0.1 * x)


FUNCTIONS = {
    "swish": jax.nn.swish,
    "gelu": jax.nn.gelu,
    "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "hard swish": jax.nn.hard_swish,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "leaky relu": jax.nn.leaky_relu,
    "where": leaky,
    "softplus": jax.nn.softplus,
    "mish": mish,
    "a sigmoid by hand": own_sigmoid,
    "a square behind relu": lambda x: jax.nn.relu(x) ** 2,
    "exp": lambda x: jnp.exp(-x * x),
    "a scale": lambda x: 0.5 * jnp.tanh(x) + 0.25,
    "bounds of a function": lambda x: jnp.clip(jax.nn.swish(x), -0.1, 1),
}


def gate_of_channels(x):
    return x * jax.nn.sigmoid(x.mean((1, 2), keepdims=True))


def gated_half(x):
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * jax.nn.sigmoid(b), b], -1)


def norm_behind_relu(x):
    """Batch norm, in inference, of what has no linear form."""
    return jax.nn.relu(jax.nn.relu(x) * jnp.linspace(-1, 2, 8) + jnp.linspace(0.5, -0.5, 8))


def pooled(x):
    return x.mean((1, 2), keepdims=True) * 2


BETWEEN = {
    "a gate of channels": gate_of_channels,
    "a gated half": gated_half,
    "slopes by channel": lambda x: jnp.where(x > 0, x, jnp.linspace(-0.3, 0.5, 8) * x),
    "a function by channel": lambda x: jnp.sin(x * jnp.linspace(0.5, 2, 8)) - jnp.arange(8.0) / 4,
    "slopes of factors": lambda x: jax.nn.elu(jax.nn.relu(x) * jnp.linspace(-1, 2, 8) - 0.5),
    "a product of functions": lambda x: jnp.tanh(x) * jax.nn.swish(jnp.flip(x, 1)),
    "factors behind relu": norm_behind_relu,
    "factors behind a function": lambda x: jnp.tanh(x) * jnp.linspace(-1, 2, 8),
    "a mean that keeps its axes": pooled,
    "stacked": lambda x: jnp.stack([x, jax.nn.relu(x)], -1)[..., 1],
}
MODELS = {name: network(between) for name, between in {**FUNCTIONS, **BETWEEN}.items()}


SAME = ((1, 1), (1, 1))


def convolved(x, kernel, strides=(1, 1), padding: Any = SAME, first=False, **options):
    spec = ("NCHW", "OIHW", "NCHW") if first else ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=spec, **options
    )


def channels_first(p, x):
    """A convolution with a bias and batch norm by channel, as in Equinox."""
    kernel = p["second"]["kernel"].transpose(3, 2, 0, 1)
    x = conv(x, p["first"]).transpose(0, 3, 1, 2) + p["first"]["bias"][:, None, None]
    x = (
        convolved(jax.nn.relu(x), kernel, (2, 1), first=True)
        * jnp.linspace(-1, 2, 8)[:, None, None]
    )
    return head(p, jnp.tanh(x).transpose(0, 2, 3, 1))


def products(p, x):
    """Dense layers over two axes, to two axes, and with the weights on the left."""
    x = conv(x, p["first"]).mean((1, 2))
    heads = jax.nn.relu(jnp.einsum("ni,iab->nab", x, p["second"]["kernel"][0, :1].reshape(8, 2, 4)))
    x = jax.nn.relu(jnp.einsum("nab,abo->no", heads, p["second"]["kernel"][1, 1].reshape(2, 4, 8)))
    return jax.lax.dot_general(p["head"]["kernel"], x, (((0,), (1,)), ((), ()))).T


def between(layer):
    """A network with a layer of its own between convolution and head."""
    return lambda p, x: head(p, layer(jax.nn.relu(conv(x, p["first"])), p["second"]["kernel"]))


LAYOUTS = {
    "channels first": channels_first,
    "products": products,
    "a convolution that crops": between(
        lambda x, kernel: convolved(x, kernel, padding=((-1, 0), (1, -2)))
    ),
    "a transposed convolution": between(
        lambda x, kernel: convolved(x, kernel, padding=((1, 2), (2, 2)), lhs_dilation=(2, 3))
    ),
    "a transposed convolution without borders": between(
        lambda x, kernel: jax.lax.conv_transpose(x, kernel, (3, 2), "VALID")
    ),
    "a transposed convolution that crops": between(
        lambda x, kernel: convolved(x, kernel, padding=((-1, 2), (1, -2)), lhs_dilation=(2, 1))
    ),
}
MODELS.update(LAYOUTS)
MODELS["features"] = lambda p, x: conv(jax.nn.swish(conv(x, p["first"])), p["second"])
MODELS["factors of rows"] = lambda p, x: (
    (jax.nn.relu(head(p, conv(x, p["first"]))) * jnp.linspace(-1, 2, 5) + jnp.linspace(0, 1, 5))
    @ jnp.asarray(p["head"]["kernel"][:5])
)


# One of each kind: of functions, products, factors and layouts.
PLAIN = (
    *("swish", "where", "a square behind relu", "bounds of a function", "a gate of channels"),
    *("a gated half", "slopes by channel", "a product of functions", "factors behind relu"),
    *("channels first", "products", "a transposed convolution that crops", "features"),
)


@pytest.mark.parametrize("name", others_long(MODELS, PLAIN))
def test_a_model_is_integer_throughout_and_none_of_its_codes_differ(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = calibrated(MODELS[name])
    graph = jaxqat.convert(model, X[:2], strict=True)
    assert not graph.float_ops
    graph = jaxqat.load(jaxqat.save(graph, tmp_path / "network"))
    check = jaxqat.verify(model, graph=graph, batches=[X, X * 2])
    assert (check.differing, check.failures) == (0, ())
    assert check.codes > 1000
    # In NumPy, and in ONNX Runtime with standard operators.
    found = np.asarray(jaxqat.make_executor(graph)(X))
    np.testing.assert_array_equal(integer_graph.run(graph, X)[1], found)
    path = jaxqat.export_onnx(graph, tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    np.testing.assert_array_equal(session.run(None, {given.name: X})[0], found)
    # And it is as good as the model: 8 bits at up to 6 places leave more than 20 dB.
    assert sqnr.decibels(MODELS[name](PARAMS, X), found) > 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_table_holds_the_function_of_each_code(name):
    graph = jaxqat.convert(calibrated(MODELS[name]), X[:2])
    (node,) = [node for node in graph.nodes if isinstance(node, g.Table)]
    source, out = graph.tensors[node.inputs[0]], graph.tensors[node.output]
    real = (np.arange(-128, 128) - source.zero_point) * np.float64(source.scale)
    with jax.enable_x64(True):
        values = np.asarray(FUNCTIONS[name](jnp.asarray(real)))
    units = values / np.float64(out.scale)
    wanted = np.clip(np.round(units) + out.zero_point, out.low, out.high)
    # float32 has 24 bits, and units are below 2**8: the error of a unit is about 2**-16 for each
    # operation. Nearer to a tie, either code is right.
    clear = np.abs(np.abs(units - np.floor(units)) - 0.5) > 2**-12
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(node.table[clear], wanted[clear])
    assert len(set(node.table.tolist())) > 20


def test_training_and_inference_quantize_the_same_tensors():
    """Batch norm and dropout before and behind a gate: their ranges have the same names."""
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x))
            x = nn.Dropout(0.1, deterministic=not train)(nn.swish(x))
            gate = nn.sigmoid(nn.Dense(8)(nn.gelu(nn.Dense(4)(x.mean((1, 2))))))
            x = nn.BatchNorm(use_running_average=not train)(nn.relu(x * gate[:, None, None]))
            return nn.Dense(5)(nn.relu(nn.Conv(8, (1, 1))(x)).mean((1, 2)))

    net = Net()
    variables = net.init(jax.random.key(0), X, train=False)
    model = jaxqat.quantize(net)
    bound = jaxqat.calibrate(model, variables, batches=[X], train=False)
    ranges = jax.tree.map(np.shape, bound.variables["quant"])

    def loss(params):
        _, changed = model.apply(
            {**bound.variables, "params": params},
            X,
            train=True,
            mutable=["batch_stats", "quant"],
            rngs={"dropout": jax.random.key(1)},
        )
        return (_**2).sum(), changed

    gradients, changed = jax.grad(loss, has_aux=True)(bound.variables["params"])
    assert jax.tree.map(np.shape, changed["quant"]) == ranges
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))
    # Every range followed the batch.
    before, after = bound.variables["quant"], changed["quant"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(any(jax.tree.leaves(tensor)) for tensor in jax.tree.leaves(moved, is_leaf=_is_range))


def _is_range(node):
    return isinstance(node, dict) and "count" in node


def test_batch_norm_of_joined_tensors_stays_in_float():
    """One grid for channels of different widths costs DenseNet 12 dB."""

    def between(x):
        x = jnp.concatenate([x, 0.01 * jax.nn.relu(x)], -1)
        return jax.nn.relu(x * jnp.linspace(1, 100, 16))[..., 4:12]

    graph = jaxqat.convert(calibrated(network(between)), X[:2])
    (island,) = graph.islands
    assert "concatenate" in island.operations


def test_layer_normalization_stays_in_float_as_a_whole():
    """Its factors depend on the data: rounding them in between would cost accuracy for nothing."""

    def between(x):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return jax.nn.swish(x * jnp.linspace(0.5, 2, 8) + 0.1)

    graph = jaxqat.convert(calibrated(network(between)), X[:2])
    (island,) = graph.islands
    assert island.inputs == ("first/real",)
    assert "logistic" in island.operations
