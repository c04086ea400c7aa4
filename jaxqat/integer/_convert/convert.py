# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`convert`: turn a quantized model into an integer graph.

The model's inference program is traced once more. `emit` writes a node for each integer form that
the program evaluates, and the program itself computes every scale, code, bias and multiplier. No
number is computed by other code than in training, so none can differ.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.errors import ConversionError
from jaxqat.integer import graph as g
from jaxqat.integer._convert.emit import OUTPUT, Deferred, Emitter
from jaxqat.integer._convert.geometry import UnconvertibleError
from jaxqat.quant import _forms as forms
from jaxqat.quant._interpret import Evaluator
from jaxqat.quant._numerics.promotion import default_promotion
from jaxqat.quant._plan.plan import STATISTICS
from jaxqat.quant._trace.arguments import split_arrays
from jaxqat.quant.models.bound import QuantizedModel


def convert(
    model: QuantizedModel,
    *arguments: Any,
    requantization: g.Requantization = "float",
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
    metadata: dict[str, object] | None = None,
    **kwargs: Any,
) -> g.IntegerGraph:
    """Return the integer network of a quantized model.

    Its codes equal those of the model in inference mode with frozen ranges, tensor by tensor
    (`jaxqat.verify` compares them on data).

        graph = jaxqat.convert(model, variables, images, train=False)

    Args:
        model: What `jaxqat.quantize` returned.
        *arguments: The arguments of the model's call: (variables, *inputs), or (*inputs) for a
            model that holds its variables. Only shapes and types of the inputs matter.
        requantization: 'float': one float32 multiplication and a rounding; 'fixed_point': an int32
            multiplier and a rounding shift, no floating point between the input's codes and the
            last accumulator.
        preprocess: Function from uint8 images to the model's float input. Each value must depend on
            the value in its place and its channel alone, as in normalization; this is checked on
            random images. With it the graph takes uint8 images too.
        metadata: Plain data to keep with the graph.
        **kwargs: Keyword arguments of the model's call, such as `train=False`.

    Returns:
        The graph.

    Raises:
        ConversionError: Parts of the model have no integer form, or ranges have seen no data; the
            error lists each with the reason. Or the network depends on the batch size, or
            `preprocess` on more than a value and its channel.
        QuantizationError: The variables hold no ranges for the model.
    """
    if not isinstance(model, QuantizedModel):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConversionError(
            "convert takes what `jaxqat.quantize` returned, trained or calibrated, got "
            f"{type(model).__name__}."
        )
    requantizations = ("float", "fixed_point")
    if requantization not in requantizations:
        raise ConversionError(
            f"requantization must be one of {', '.join(requantizations)}, got {requantization!r}."
        )
    traced = _TracedModel(model, arguments, kwargs)
    emitter, arrays = traced.run()
    values = [np.asarray(a) for a in arrays]
    broken = [reason for index, reason in emitter.requirements if not values[index].all()]
    emitter.check(list(dict.fromkeys(broken)))
    traced.check_batch_size(emitter, values)
    nodes = [cls(**_finish_node(fields, values)) for cls, fields in emitter.nodes]
    tensors = {n: g.Tensor(**_finish(fields, values)) for n, fields in emitter.tensors.items()}
    output, output_shape = emitter.output
    nodes = _needed(nodes, output)
    kept = {node.output for node in nodes}
    if preprocess is not None:
        nodes = [_with_table(node, tensors, preprocess) for node in nodes]
    try:
        return g.IntegerGraph(
            input_shape=emitter.input_shape or (),
            tensors={name: t for name, t in tensors.items() if name in kept},
            nodes=tuple(nodes),
            output=output,
            output_shape=output_shape,
            requantization=requantization,
            metadata=metadata or {},
        )
    except g.GraphError as error:
        raise ConversionError(f"The model cannot be converted: {error}") from error


def obstacles(model: QuantizedModel, *arguments: Any, **kwargs: Any) -> tuple[str, ...]:
    """Return the reasons why a model cannot be converted: each part without an integer form.

    Nothing is computed: only shapes and types of the arguments matter, and ranges may be empty.

    Args:
        model: What `jaxqat.quantize` returned.
        *arguments: As for `convert`.
        **kwargs: Keyword arguments of the model's call, such as `train=False`.
    """
    try:
        _TracedModel(model, arguments, kwargs).trace()
    except ConversionError as error:
        return error.reasons
    return ()


class _ModelEmitter(Emitter):
    """Emit a whole model, and collect the reasons why it cannot be converted."""

    def __init__(self):
        super().__init__()
        self.problems: list[str] = []
        self.output: tuple[str, tuple[int, ...]] = (OUTPUT, ())

    @default_promotion
    def model(self, evaluator: Evaluator) -> None:
        for info in evaluator.plan.table:
            if info.float_reason is not None:
                self.problems.append(f"{info.path} ({info.kind}): {info.float_reason}")
        for name, codes in evaluator.codes.items():
            key = evaluator.range_keys[name]
            path, state = "/".join(key), evaluator.state[key]  # The same in all iterations.
            self.require(
                state.get("count", 1) > 0,
                f"{path}: its range has seen no data; `calibrate` the ranges first",
            )
            self.require(jnp.isfinite(codes.grid.scale), f"{path}: its range is not finite")
            emit = functools.partial(self.site, name, evaluator.forms[name], codes)
            self._try(path, emit, tensor="/".join(name))
        self._try("the model's output", lambda: self._result(evaluator.outputs))
        if self.problems and STATISTICS in evaluator.plan.level:
            self.problems.append(
                "it computes statistics of the batch: if that is batch norm in training, convert "
                "it as in inference (train=False, or `eval()` of an NNX module)"
            )

    def check(self, problems: list[str]) -> None:
        """Raise ConversionError if there are problems."""
        if problems:
            raise ConversionError(
                "The model cannot become an integer network:\n  " + "\n  ".join(problems),
                problems,
            )

    def _try(self, where: str, emit: Callable[[], None], tensor: str = "") -> None:
        try:
            emit()
        except UnconvertibleError as error:
            message = str(error).replace(tensor or where, where)
            problem = message if where in message else f"{where}: {message}"
            if problem not in self.problems:  # Iterations of a loop have the same.
                self.problems.append(problem)
        except KeyError:
            # It reads a tensor without an integer form; the reason is in `problems` already.
            if not self.problems:
                raise

    def _result(self, outputs: list[forms.Operand]) -> None:
        if len(outputs) != 1:
            raise UnconvertibleError(f"has {len(outputs)} arrays; an integer network has one")
        form, values = outputs[0].form, outputs[0].values
        if isinstance(form, forms.Accumulator):
            self.output = (OUTPUT, form.total.shape[1:])
            return self.accumulate(form, None, OUTPUT)
        if isinstance(form, forms.Codes):
            self.output = (self.read(form), form.codes.shape[1:])
            return None
        reason = outputs[0].float_reason or (
            "an addition, a clipping or a reshaping of the last product" if form else "the input"
        )
        shape = () if values is None else tuple(values.shape)
        raise UnconvertibleError(
            f"{shape} is made by {reason}; let it be that of the last product, and do what "
            "follows it (softmax, for one) outside of the model"
        )


class _TracedModel:
    """Trace a model, and compute the arrays of its graph."""

    def __init__(self, model: QuantizedModel, arguments: tuple[Any, ...], kwargs: dict[str, Any]):
        bound, inputs = model.bind_call(arguments, kwargs)
        shapes, self._make_inputs = split_arrays((inputs, dict(bound.kwargs)))
        # NumPy's int64 becomes int32 as an input of a jitted function; `jnp.zeros` would warn.
        dtypes = [jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True) for x in shapes]
        self._examples = [
            jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in zip(shapes, dtypes, strict=True)
        ]
        self._parameters, self._rebuild = bound.split_arrays()
        self._found: list[_ModelEmitter] = []

    def trace(self) -> None:
        """Raise ConversionError if a part of the model has no integer form."""
        jax.eval_shape(self._function, self._parameters, self._examples)

    def run(self) -> tuple[_ModelEmitter, list[jax.Array]]:
        """Return the emitter with all nodes, and the arrays for their deferred fields."""
        return self._run(self._examples)

    def _run(self, shapes: list[jax.ShapeDtypeStruct]) -> tuple[_ModelEmitter, list[jax.Array]]:
        examples = [jnp.zeros(x.shape, x.dtype) for x in shapes]
        arrays: list[jax.Array] = jax.jit(self._function)(self._parameters, examples)
        return self._found[-1], arrays

    def check_batch_size(self, emitter: _ModelEmitter, values: list[np.ndarray]) -> None:
        """Raise ConversionError if the network is another one for batches of another size.

        A model that cannot run with another batch size is not checked.

        Args:
            emitter: The emitter of the converted network.
            values: Its arrays.
        """
        batch = next((x.shape[0] for x in self._examples if x.shape), 0)
        doubled = [
            jax.ShapeDtypeStruct((2 * batch, *x.shape[1:]), x.dtype)
            if x.shape[:1] == (batch,)
            else x
            for x in self._examples
        ]
        try:
            other, arrays = self._run(doubled)
        except ConversionError as error:
            raise ConversionError(
                f"The model depends on the batch size: it can be converted with {batch} examples, "
                f"but not with {2 * batch}. {error}",
                error.reasons,
            ) from None
        except Exception:  # Whatever the model raises; the batch size may be part of it.
            return
        names = [_name_of(index, emitter) for index in _unlike(values, arrays)]
        if len(arrays) != len(values) or len(other.nodes) != len(emitter.nodes) or names:
            where = f" ({', '.join(dict.fromkeys(names))})" if names else ""
            raise ConversionError(
                f"The model depends on the batch size: with {batch} examples and with {2 * batch} "
                f"its integer networks differ{where}. Use `x.mean(0)` or the like in place of a "
                "division by `x.shape[0]`, or leave what needs the batch size outside of the model."
            )

    def _function(self, parameters: list[Any], examples: list[Any]) -> list[jax.Array]:
        inputs, kwargs = self._make_inputs(examples)
        emitter = _ModelEmitter()
        emitter.model(self._rebuild(parameters).record(*inputs, **kwargs))
        self._found.append(emitter)
        emitter.check(emitter.problems)
        return emitter.arrays


def _unlike(left: list[np.ndarray], right: list[jax.Array]) -> list[int]:
    """Return the places of arrays that differ by more than two programs' roundings do."""
    pairs = enumerate(zip(left, map(np.asarray, right), strict=False))
    return [i for i, (a, b) in pairs if a.shape != b.shape or not _alike(a, b)]


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    # A batch of twice the size changes a factor by 2; a rounding changes an integer by 1.
    absolute = 0.0 if np.issubdtype(a.dtype, np.floating) else 1.0
    return np.allclose(a.astype(np.float64), b, rtol=1e-3, atol=absolute, equal_nan=True)


def _name_of(index: int, emitter: Emitter) -> str:
    """Return the name of the node or tensor that has a deferred array."""
    owners = [*(fields for _, fields in emitter.nodes), *emitter.tensors.values()]
    return next((f["name"] for f in owners if index in _indices(tuple(f.values()))), "a condition")


def _indices(value: Any) -> set[int]:
    if isinstance(value, Deferred):
        return {value.index}
    parts = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else ()
    return set[int]().union(*map(_indices, parts))


def _finish(fields: dict[str, Any], values: list[np.ndarray]) -> dict[str, Any]:
    def finished(value: Any) -> Any:
        if isinstance(value, Deferred):
            return value.finish(values[value.index])
        if isinstance(value, tuple):
            return tuple(map(finished, cast("tuple[Any, ...]", value)))
        return value

    return {key: finished(value) for key, value in fields.items()}


def _finish_node(fields: dict[str, Any], values: list[np.ndarray]) -> dict[str, Any]:
    done = _finish(fields, values)
    signs = done.pop("weight_signs", None)
    if signs is not None:
        done["weights"] = done["weights"] * signs  # -1 negates a channel, 0 removes it.
    return done


def _needed(nodes: list[g.Node], output: str) -> list[g.Node]:
    """Return the nodes that the output depends on."""
    needed, kept = {output}, list[g.Node]()
    for node in reversed(nodes):
        if node.output in needed or isinstance(node, g.Quantize):
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _with_table(
    node: g.Node, tensors: dict[str, g.Tensor], preprocess: Callable[[jax.Array], jax.Array]
) -> g.Node:
    if not isinstance(node, g.Quantize):
        return node
    tensor = tensors[node.output]

    @default_promotion
    def rounded(values: jax.Array, inverse: jax.Array) -> jax.Array:
        units = jnp.round(values.astype(jnp.float32) * inverse)
        units = jnp.where(jnp.isnan(units), np.float32(0), units)  # As an executor does.
        return jnp.clip(units + tensor.zero_point, tensor.low, tensor.high).astype(jnp.int8)

    @jax.jit
    def codes(images: jax.Array, inverse: jax.Array) -> jax.Array:
        return rounded(preprocess(images), inverse)

    channels = tensor.shape[-1]
    shape = (256, *(1,) * (len(tensor.shape) - 1), channels)
    values = jnp.broadcast_to(
        jnp.arange(256, dtype=jnp.uint8).reshape(256, *(1,) * len(tensor.shape)), shape
    )
    table = np.asarray(codes(values, node.inverse))
    if table.shape != shape:
        raise _not_pointwise(f"It makes the shape {table.shape} of {shape}")
    table = table.reshape(256, channels)
    images = _random_images(tensor.shape)
    wanted, found = codes(jnp.asarray(images), node.inverse), table[images, np.arange(channels)]
    differing = int((np.asarray(wanted) != found).sum())
    if differing:
        raise _not_pointwise(f"On random images, {differing:,} of {images.size:,} codes differ")
    return dataclasses.replace(node, table=table)


def _not_pointwise(observation: str) -> ConversionError:
    return ConversionError(
        "preprocess must compute each value from the uint8 value in its place and its channel "
        f"alone, as (x / 255 - mean) / std does. {observation}: it looks at other values "
        "(standardization of each image) or at the place (subtraction of a mean image). Convert "
        "without preprocess and give the network float images."
    )


def _random_images(shape: tuple[int, ...]) -> np.ndarray:
    """Return two images of all values and two of little contrast, a dark and a bright one."""
    bounds = ((0, 256), (0, 256), (10, 60), (180, 230))
    random = np.random.default_rng(0)
    return np.stack([random.integers(*ends, shape) for ends in bounds]).astype(np.uint8)
