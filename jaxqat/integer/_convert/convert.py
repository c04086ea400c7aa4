# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`convert`: turn a quantized model into an integer graph.

The model's inference program is traced once more. `emit` writes a node for each integer form that
the program evaluates, and the program itself computes every scale, code, bias and multiplier. No
number is computed by other code than in training, so none can differ.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.errors import ConversionError
from jaxqat.integer import graph as g
from jaxqat.integer._convert.batch_sizes import batch_sizes, unlike
from jaxqat.integer._convert.emit import Emitter
from jaxqat.integer._convert.fields import finished, finished_node, indices
from jaxqat.integer._convert.geometry import UnconvertibleError
from jaxqat.integer._convert.places import Place, argument_places, result_place
from jaxqat.integer._convert.program import ArraysProgram
from jaxqat.integer._convert.table import with_tables
from jaxqat.quant import _forms as forms
from jaxqat.quant._interpret import Evaluator
from jaxqat.quant._models.bound import QuantizedModel
from jaxqat.quant._numerics.promotion import default_promotion
from jaxqat.quant._plan.plan import STATISTICS
from jaxqat.quant._trace.arguments import split_arrays


def convert(
    model: QuantizedModel,
    *arguments: Any,
    requantization: g.Requantization = "float",
    strict: bool = False,
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
    metadata: dict[str, object] | None = None,
    **kwargs: Any,
) -> g.IntegerGraph:
    """Return the integer network of a quantized model.

    Its codes equal those of the model in inference mode with frozen ranges, tensor by tensor
    (`jaxqat.verify` compares them on data). What has no integer form is computed in float32, by
    operations between two integer parts: a float island. Behind one, codes can differ by one where
    two programs round differently.

        graph = jaxqat.convert(model, variables, images, train=False)

    Args:
        model: What `jaxqat.quantize` returned.
        *arguments: The arguments of the model's call: (variables, *inputs), or (*inputs) for a
            model that holds its variables. Only shapes and types of the inputs matter.
        requantization: 'float': one float32 multiplication and a rounding; 'fixed_point': an int32
            multiplier and a rounding shift, no floating point between the input's codes and the
            last accumulator.
        strict: Whether to refuse a model with parts that have no integer form.
        preprocess: Function from uint8 images to the model's float input. Each value must depend on
            the value in its place and its channel alone, as in normalization; this is checked on
            random images. With it the graph takes uint8 images too. For models of one input.
        metadata: Plain data to keep with the graph.
        **kwargs: Keyword arguments of the model's call, such as `train=False`.

    Returns:
        The graph.

    Raises:
        ConversionError: Ranges have seen no data; or parts of the model have no integer form, and
            `strict` is set, or they can be in no island either, as random numbers; the error lists
            each with the reason. Or the network depends on the batch size, or `preprocess` on more
            than a value and its channel.
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
    traced = _TracedModel(model, arguments, kwargs, strict)
    emitter, values = traced.run()
    nodes = traced.with_batch_sizes(emitter, values)
    nodes = [cls(**finished_node(fields, values)) for cls, fields in nodes]
    tensors = {n: g.Tensor(**finished(fields, values)) for n, fields in emitter.tensors.items()}
    nodes = _needed(nodes, [output.name for output in emitter.outputs])
    kept = {node.output for node in nodes}
    read = {name for node in nodes for name in node.inputs}
    inputs = tuple(each for each in emitter.inputs if each.name in read)
    if preprocess is not None:
        nodes = with_tables(nodes, inputs, tensors, preprocess)
    try:
        return g.IntegerGraph(
            inputs=inputs,
            tensors={name: t for name, t in tensors.items() if name in kept},
            nodes=tuple(nodes),
            outputs=tuple(emitter.outputs),
            requantization=requantization,
            metadata=metadata or {},
        )
    except g.GraphError as error:
        raise ConversionError(f"The model cannot be converted: {error}") from error


def obstacles(model: QuantizedModel, *arguments: Any, **kwargs: Any) -> tuple[str, ...]:
    """Return the parts of a model without an integer form, with the reasons.

    Nothing is computed: only shapes and types of the arguments matter, and ranges may be empty.

    Args:
        model: What `jaxqat.quantize` returned.
        *arguments: As for `convert`.
        **kwargs: Keyword arguments of the model's call, such as `train=False`.
    """
    try:
        _TracedModel(model, arguments, kwargs, strict=True).trace()
    except ConversionError as error:
        return error.reasons
    return ()


_AS_IN_INFERENCE = ": convert it as in inference (train=False, or `eval()` of an NNX module)"
_STATISTICS = (
    f"it computes statistics of the batch, as batch norm does in training{_AS_IN_INFERENCE}"
)


class _ModelEmitter(Emitter):
    """Emit a whole model, and collect the reasons why it cannot be converted."""

    def __init__(self, strict: bool, as_products: frozenset[str], batch: int, given: Any):
        super().__init__(strict, as_products, batch, given)
        self.problems: list[str] = []
        self.hint = ""  # What the reason for problems may be.
        self.outputs: list[g.Output] = []

    @default_promotion
    def model(self, evaluator: Evaluator) -> None:
        for node in evaluator.plan.dropouts:
            where = node.module or "the model"
            self.problems.append(f"{where}: drops elements at random{_AS_IN_INFERENCE}")
        self.hint = _STATISTICS if STATISTICS in evaluator.plan.level else ""
        for info in evaluator.plan.table:
            if info.float_reason is not None and self.strict:
                self.problems.append(f"{info.path} ({info.kind}): {info.float_reason}")
        for name, codes in evaluator.codes.items():
            key = evaluator.range_keys[name]
            path, state = "/".join(key), evaluator.state[key]  # The same in all iterations.
            self.require(
                state.get("count", 1) > 0,
                f"{path}: its range has seen no data; `calibrate` the ranges first",
            )
            self.require(jnp.isfinite(codes.grid.scale), f"{path}: its range is not finite")
            form, before = evaluator.forms[name], evaluator.before[name]
            emit = functools.partial(self.quantized, name, form, before, codes)
            self._try(path, emit, tensor="/".join(name))
        places = [result_place(path) for path in evaluator.paths]
        for place, operand in zip(places, evaluator.outputs, strict=True):
            where = "/".join(("the model's output", *map(str, place or ())))
            self._try(where, functools.partial(self._result, place, operand))
        if self.problems and self.hint:
            self.problems.append(self.hint)

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

    def _result(self, path: Place | None, output: forms.Operand) -> None:
        form, values = output.form, output.values
        shape = () if values is None else tuple(values.shape)
        if path is None:
            raise UnconvertibleError(
                f"{shape} is the new value of a variable of the model{_AS_IN_INFERENCE}"
            )
        name = self.attempt(lambda: self._integer_result(form))
        if name is None and self.strict:
            name = self._integer_result(form)
        if name is None and not self.strict:
            name = self.islands.result(output)
            if output.constant and shape[:1] != (self.batch,):
                raise UnconvertibleError(f"{shape} is the same for every input, without a batch")
        if name is not None:
            self.outputs.append(g.Output(name=name, shape=shape[1:], path=path))
            return
        reason = output.float_reason or (
            "the input"
            if form is None or any(True for _ in forms.real_parts(form))
            else "an addition, a clipping or a reshaping of the last product"
        )
        raise UnconvertibleError(
            f"{shape} comes from {reason}. Return the result of the last product, and apply what "
            "follows it, such as softmax, outside of the model"
        )

    def _integer_result(self, form: forms.Form | None) -> str | None:
        """Emit the result of a last product, or codes; return its name, None for other forms."""
        if isinstance(form, forms.Accumulator | forms.Paired):
            return self.islands.exact(form)
        return self.read(form) if isinstance(form, forms.Codes) else None


class _TracedModel:
    """Trace a model, and compute the arrays of its graph."""

    def __init__(
        self,
        model: QuantizedModel,
        arguments: tuple[Any, ...],
        kwargs: dict[str, Any],
        strict: bool,
    ):
        self._strict, self._as_products = strict, frozenset[str]()
        bound, inputs = model.bind_call(arguments, kwargs)
        shapes, self._make_inputs = split_arrays((inputs, dict(bound.kwargs)))
        self._places = argument_places(inputs, dict(bound.kwargs))
        # NumPy's int64 becomes int32 as an input of a jitted function; `jnp.zeros` would warn.
        dtypes = [jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True) for x in shapes]
        self._examples = [
            jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in zip(shapes, dtypes, strict=True)
        ]
        self._parameters, self._rebuild = bound.split_arrays()
        self._found: list[_ModelEmitter] = []
        self._computed: dict[bytes, list[jax.Array]] = {}  # By program.

    def trace(self) -> None:
        """Raise ConversionError if a part of the model has no integer form."""
        jax.eval_shape(self._function, self._parameters, self._examples)

    def run(self) -> tuple[_ModelEmitter, list[np.ndarray]]:
        """Return the emitter with all nodes, and the arrays for their deferred fields.

        Raises:
            ConversionError: The numbers of a part are not what its integer form needs.
        """
        emitter, arrays = self._run_as_given()
        values = [np.asarray(a) for a in arrays]
        broken = [r for r in emitter.requirements if not values[r.index].all()]
        as_products = {r.part for r in broken if r.part is not None}
        if as_products:  # Known only now.
            self._as_products |= as_products
            return self.run()
        emitter.check(list(dict.fromkeys(r.reason for r in broken)))
        return emitter, values

    def _run_as_given(self) -> tuple[_ModelEmitter, list[jax.Array]]:
        """Run with the given shapes; a batch of 1, which no array shows, becomes one of 2.

        A strict conversion, or of a model that cannot run with 2 examples, keeps to 1.
        """
        if self._batch == 1 and not self._strict:
            given, self._examples = self._examples, self._doubled()
            try:
                return self._run(self._examples)
            except ConversionError:
                raise
            except Exception:  # Whatever the model raises.
                self._examples = given
        return self._run(self._examples)

    @property
    def _batch(self) -> int:
        return next((x.shape[0] for x in self._examples if x.shape), 0)

    def _doubled(self) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes of a batch of twice the size."""
        batch = self._batch
        return [
            jax.ShapeDtypeStruct((2 * batch, *x.shape[1:]), x.dtype)
            if x.shape[:1] == (batch,)
            else x
            for x in self._examples
        ]

    def _run(self, shapes: list[jax.ShapeDtypeStruct]) -> tuple[_ModelEmitter, list[jax.Array]]:
        """Trace the model, and compute the arrays of its graph."""
        program = ArraysProgram(self._function, self._parameters, shapes)
        if program.key not in self._computed:
            self._computed[program.key] = program(self._parameters, shapes)
        return self._found[-1], self._computed[program.key]

    def with_batch_sizes(
        self, emitter: _ModelEmitter, values: list[np.ndarray]
    ) -> list[tuple[type[g.Node], dict[str, Any]]]:
        """Return class and fields of each node, for batches of any size.

        A model that cannot run with another batch size is not checked, if it has no islands.

        Args:
            emitter: The emitter of the converted network.
            values: Its arrays.

        Raises:
            ConversionError: The network is another one for batches of another size.
        """
        batch = self._batch
        try:
            other, arrays = self._run(self._doubled())
        except ConversionError as error:
            raise ConversionError(
                f"The model depends on the batch size: it can be converted with {batch} examples, "
                f"but not with {2 * batch}. {error}",
                error.reasons,
            ) from None
        except Exception as error:  # Whatever the model raises; the batch size may be part of it.
            if any(cls is g.FloatOp for cls, _ in emitter.nodes):
                raise ConversionError(
                    "A model with float islands must run with any batch size: it ran with "
                    f"{batch} examples, and not with {2 * batch}: {error}"
                ) from error
            return emitter.nodes
        names = [_name_of(index, emitter) for index in unlike(values, arrays)]
        if len(arrays) != len(values) or len(other.nodes) != len(emitter.nodes) or names:
            where = f" ({', '.join(dict.fromkeys(names))})" if names else ""
            raise ConversionError(
                f"The model depends on the batch size: with {batch} examples and with {2 * batch} "
                f"its integer networks differ{where}. Use `x.mean(0)` or the like in place of a "
                "division by `x.shape[0]`, or leave what needs the batch size outside of the model."
                + _hinted(emitter)
            )
        return [
            (cls, batch_sizes(fields, twin, batch, _hinted(emitter)))
            if cls is g.FloatOp
            else (cls, fields)
            for (cls, fields), (_, twin) in zip(emitter.nodes, other.nodes, strict=True)
        ]

    def _function(self, parameters: list[Any], examples: list[Any]) -> list[jax.Array]:
        inputs, kwargs = self._make_inputs(examples)
        batch = next((x.shape[0] for x in examples if x.shape), 0)
        given = list(zip(self._places, examples, strict=True))
        emitter = _ModelEmitter(self._strict, self._as_products, batch, given)
        emitter.model(self._rebuild(parameters).record(*inputs, **kwargs))
        self._found.append(emitter)
        emitter.check(emitter.problems)
        return emitter.arrays


def _hinted(emitter: _ModelEmitter) -> str:
    """Return the hint as a sentence behind another one."""
    return f" {emitter.hint[0].upper()}{emitter.hint[1:]}." if emitter.hint else ""


def _name_of(index: int, emitter: Emitter) -> str:
    """Return the name of the node or tensor that has a deferred array."""
    owners = [*(fields for _, fields in emitter.nodes), *emitter.tensors.values()]
    return next((f["name"] for f in owners if index in indices(tuple(f.values()))), "a condition")


def _needed(nodes: list[g.Node], outputs: list[str]) -> list[g.Node]:
    """Return the nodes that the outputs depend on."""
    needed, kept = set(outputs), list[g.Node]()
    for node in reversed(nodes):
        if node.output in needed:
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]
