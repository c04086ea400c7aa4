"""What a user does with a model, for Linen, NNX, Equinox and functions in the same words."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxqat
from jaxqat.integer._results import flat

CLASSES, BATCH, WORDS = 5, 20, 12
LABELS = np.arange(BATCH) % CLASSES


def _images() -> np.ndarray:
    """A pattern for each class, and noise of half its size."""
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(CLASSES, 8, 8, 1))
    return (patterns[LABELS] + 0.5 * rng.normal(size=(BATCH, 8, 8, 1))).astype(np.float32)


def _tokens() -> np.ndarray:
    """Sentences whose first two words tell the class; every third ends in padding (0)."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, WORDS, size=(BATCH, 6))
    tokens[:, :2] = 1 + LABELS[:, None]
    tokens[::3, -1] = 0
    return tokens


IMAGES, TOKENS = _images(), _tokens()


def cross_entropy(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def squared_error(result: Any) -> jax.Array:
    """Of each array of a result, against one number for each class."""

    def error(array: jax.Array) -> jax.Array:
        targets = (LABELS / CLASSES).reshape(-1, *([1] * (array.ndim - 1)))
        return jnp.mean((array - targets) ** 2)

    return sum((error(leaf) for leaf in jax.tree.leaves(result)), start=jnp.float32(0))


@dataclasses.dataclass
class Quantized:
    """A model quantized and calibrated on its inputs, and how it is trained.

    Attributes:
        model: What `jaxqat.quantize` made.
        parameters: What the optimizer changes.
        rest: All other state.
        loss: Of (parameters, rest, key): the loss in training and the state after it.
        arguments: Of (parameters, rest): what stands before the inputs in inference.
        inputs: The batch.
        kwargs: That say that it is inference.
        weights: Of the parameters, or their gradients: the model's own tree.
        added: Collections or types of variables that the state has beyond the model's own.
        before: The model's own tree before it was quantized, copied.
        module_is_unchanged: Whether the module that was given is as it was.
    """

    model: Any
    parameters: Any
    rest: Any
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
    arguments: Callable[[Any, Any], tuple[Any, tuple[Any, ...]]]
    inputs: np.ndarray
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: Callable[[Any], Any] = lambda parameters: parameters
    added: frozenset[str] = frozenset()
    before: Any = None
    module_is_unchanged: Callable[[], bool] = lambda: True

    def in_inference(self) -> tuple[Any, tuple[Any, ...]]:
        return self.arguments(self.parameters, self.rest)

    def table(self) -> tuple[jaxqat.LayerInfo, ...]:
        model, before = self.in_inference()
        return model.layers(*before, self.inputs, **self.kwargs)

    def describe(self) -> jaxqat.Description:
        model, before = self.in_inference()
        return jaxqat.describe(model, *before, self.inputs[:1], **self.kwargs)

    def convert(self, *, strict: bool = False) -> jaxqat.IntegerGraph:
        model, before = self.in_inference()
        return jaxqat.convert(model, *before, self.inputs[:1], strict=strict, **self.kwargs)

    def verify(self, graph: jaxqat.IntegerGraph) -> jaxqat.Verification:
        model, before = self.in_inference()
        return jaxqat.verify(model, *before, graph=graph, batches=[self.inputs], **self.kwargs)

    def train(self, steps: int, learning_rate: float) -> tuple[list[float], Any]:
        """Trains; returns the losses, and the largest magnitude of each gradient over all steps.

        In the first step a layer may have none: ranges are from inference, and what they clip has
        no gradient until they have followed batch norm's own statistics.
        """
        optimizer = optax.adam(learning_rate)
        largest: Any = None

        # Compiled for a few steps of a tiny network: optimizing takes longer than running.
        @jax.jit(compiler_options={"xla_backend_optimization_level": 0})
        def step(parameters, rest, state, key):
            (loss, rest), gradients = jax.value_and_grad(self.loss, has_aux=True)(
                parameters, rest, key
            )
            updates, state = optimizer.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), rest, state, loss, gradients

        state, losses = optimizer.init(self.parameters), []
        for key in jax.random.split(jax.random.key(0), steps):
            self.parameters, self.rest, state, loss, gradients = step(
                self.parameters, self.rest, state, key
            )
            magnitudes = jax.tree.map(lambda x: np.abs(np.asarray(x)), gradients)
            before = magnitudes if largest is None else largest
            largest = jax.tree.map(np.maximum, before, magnitudes)
            losses.append(float(loss))
        return losses, largest


def check_in_onnx_runtime(quantized: Quantized, graph: jaxqat.IntegerGraph) -> None:
    """Check each integer part in ONNX Runtime, from JAX's codes at its entry, and the results."""
    pytest.importorskip("onnxruntime")
    from jaxqat.export._onnx.model import onnx_model
    from jaxqat.export._onnx.runtime import make_runner

    run = make_runner(onnx_model(graph, by_segment=True).SerializeToString(), expose=True)
    executor = jaxqat.make_executor(graph)
    for count in (1, 3, BATCH):
        inputs = quantized.inputs[:count].astype(graph.input_type)
        codes = executor.codes(inputs)
        result, found = run(inputs, codes)
        for tensor, wanted in codes.items():
            np.testing.assert_array_equal(found[tensor], wanted, err_msg=tensor)
        for one, other in zip(
            flat(graph.outputs, result), flat(graph.outputs, executor(inputs)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def initialized(shapes: Any) -> Any:
    """Parameters and statistics of these shapes, as Flax's default initializers have them.

    In NumPy: compiling Flax's own takes longer than training these networks.
    """
    rng = np.random.default_rng(0)

    def make(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        if name in ("kernel", "embedding"):
            fan_in = leaf.shape[-1] if name == "embedding" else np.prod(leaf.shape[:-1])
            values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        elif name in ("scale", "var"):
            values = np.ones(leaf.shape)
        elif name.startswith(("gamma", "slope")):
            values = np.full(leaf.shape, 0.25)
        else:
            values = 0.02 * rng.normal(size=leaf.shape) if "pos" in name else np.zeros(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


def linen_variables(module: nn.Module, inputs: np.ndarray) -> Any:
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    return initialized(jax.eval_shape(module.init, keys, inputs))


def linen(
    module: nn.Module,
    inputs: np.ndarray,
    recipe: jaxqat.Recipe | str = "int8",
    *,
    modes: bool,
    objective: Callable[[Any], jax.Array] = cross_entropy,
) -> Quantized:
    """A Linen module; with `modes` it takes `train`. `objective` is the loss of its result."""
    kwargs: dict[str, Any] = {"train": False} if modes else {}
    variables = linen_variables(module, inputs)
    names, before, copy = set(variables), copied(variables["params"]), module.clone()
    network = jaxqat.calibrate(module, variables, batches=[inputs], recipe=recipe, **kwargs)
    model: Any = network.model
    parameters, rest = _split(network.variables)

    def loss(parameters: Any, rest: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, updates = model.apply(
            {**rest, **parameters}, inputs, mutable=list(rest), rngs={"dropout": key},
            **({"train": True} if modes else {}),
        )  # fmt: skip
        return objective(logits), updates

    arguments = lambda parameters, rest: (model, ({**rest, **parameters},))  # noqa: E731
    return Quantized(
        model, parameters, rest, loss, arguments, inputs, kwargs, lambda tree: tree["params"],
        frozenset(set(network.variables) - names), before,
        lambda: model.module is module and module == copy,  # Compared by their fields.
    )  # fmt: skip


def _split(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the collections that gradients train, and the others."""
    trained = {name: variables[name] for name in ("params", "quant_params") if name in variables}
    return trained, {name: value for name, value in variables.items() if name not in trained}


def nnx_module(
    module: nnx.Module, inputs: np.ndarray, recipe: jaxqat.Recipe | str = "int8"
) -> Quantized:
    """An NNX module."""
    whole, before = (
        copied(nnx.to_pure_dict(nnx.state(module, only)))
        for only in (nnx.Not(nnx.RngState), nnx.Param)
    )
    model: Any = jaxqat.calibrate(module, batches=[inputs], recipe=recipe).model
    added = frozenset(_types(model) - _types(module))
    model.train()
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters: Any, rest: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, parameters, rest, copy=True)
        value = cross_entropy(model(inputs))
        return value, nnx.state(model, nnx.Not(nnx.Param))

    def arguments(parameters: Any, rest: Any) -> tuple[Any, tuple[Any, ...]]:
        model = nnx.merge(graph, parameters, rest, copy=True)
        model.eval()
        return model, ()

    def unchanged() -> bool:
        now = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))
        return bool(jax.tree.all(jax.tree.map(np.array_equal, now, whole)))

    weights = lambda parameters: nnx.to_pure_dict(parameters)["module"]  # noqa: E731
    return Quantized(
        model, parameters, rest, loss, arguments, inputs, {}, weights, added, before, unchanged
    )


def _types(module: nnx.Module) -> set[str]:
    variables = jax.tree.leaves(nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {type(variable).__name__ for variable in variables}


def copied(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def function(
    model: Any, parameters: Any, inputs: np.ndarray, recipe: jaxqat.Recipe | str = "int8"
) -> Quantized:
    """A function of parameters, or an Equinox module that is its own parameters."""
    array = lambda leaf: leaf if isinstance(leaf, (jax.Array, np.ndarray)) else None  # noqa: E731
    before = copied(jax.tree.map(array, parameters))
    variables = {"params": parameters}
    network = jaxqat.calibrate(model, variables, batches=[inputs], recipe=recipe)
    quantized: Any = network.model
    trained, rest = _split(network.variables)
    arrays = {**trained, "params": jax.tree.map(array, parameters)}

    def whole(arrays: Any) -> Any:
        """With the functions that an Equinox module holds, which no gradient is taken of."""
        filled = iter(jax.tree.leaves(arrays["params"]))
        leaves, structure = jax.tree.flatten(parameters)
        params = structure.unflatten(
            [leaf if array(leaf) is None else next(filled) for leaf in leaves]
        )
        return {**arrays, "params": params}

    def loss(arrays: Any, rest: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, updates = quantized.apply({**rest, **whole(arrays)}, inputs, mutable=["quant"])
        return cross_entropy(logits), updates

    arguments = lambda arrays, rest: (quantized, ({**rest, **whole(arrays)},))  # noqa: E731
    return Quantized(
        quantized, arrays, rest, loss, arguments, inputs, weights=lambda tree: tree["params"],
        before=before,
    )  # fmt: skip


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf of a parameter tree at a path of `describe`; an iteration of a loop is an index."""
    by_path = {
        tuple(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if path in by_path:
        return by_path[path]
    *module, iteration, name = path
    return by_path[*module, name][int(iteration)]
