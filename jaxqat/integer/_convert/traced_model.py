# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The trace of a model for its conversion, and what of it depends on the size of the batch."""

import contextlib
from typing import Any

import jax
import numpy as np

from jaxqat.errors import ConversionError
from jaxqat.integer import graph as g
from jaxqat.integer._convert.batch_sizes import batch_sizes, unlike
from jaxqat.integer._convert.emit import Emitter
from jaxqat.integer._convert.fields import indices
from jaxqat.integer._convert.model_emitter import ModelEmitter
from jaxqat.integer._convert.places import argument_places
from jaxqat.integer._convert.program import ArraysProgram
from jaxqat.quant._models.bound import QuantizedModel
from jaxqat.quant._trace.arguments import split_arrays

Converted = tuple[ModelEmitter, list[np.ndarray], list[tuple[type[g.Node], dict[str, Any]]]]
_RARE_BATCH = 13


class TracedModel:
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
        self._found: list[ModelEmitter] = []
        self._computed: dict[bytes, list[jax.Array]] = {}  # By program.

    def trace(self) -> None:
        """Raise ConversionError if a part of the model has no integer form."""
        jax.eval_shape(self._function, self._parameters, self._examples)

    def converted(self) -> Converted:
        """Return the emitter, the arrays for deferred fields, and class and fields of each node.

        The batch is told from other axes by its size. Where another axis is as long, the model is
        traced again with a batch of a size that is rare.
        """
        try:
            return self._converted()
        except ConversionError as error:
            first = error
        if self._batch:
            self._examples = self._resized(_RARE_BATCH)
            with contextlib.suppress(Exception):  # Whatever the model raises.
                return self._converted()
        raise first

    def _converted(self) -> Converted:
        emitter, values = self.run()
        return emitter, values, self.with_batch_sizes(emitter, values)

    def run(self) -> tuple[ModelEmitter, list[np.ndarray]]:
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

    def _run_as_given(self) -> tuple[ModelEmitter, list[jax.Array]]:
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
        return self._resized(2 * self._batch)

    def _resized(self, size: int) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes of a batch of another size."""
        batch = self._batch
        return [
            jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) if x.shape[:1] == (batch,) else x
            for x in self._examples
        ]

    def _run(self, shapes: list[jax.ShapeDtypeStruct]) -> tuple[ModelEmitter, list[jax.Array]]:
        """Trace the model, and compute the arrays of its graph."""
        program = ArraysProgram(self._function, self._parameters, shapes)
        if program.key not in self._computed:
            self._computed[program.key] = program(self._parameters, shapes)
        return self._found[-1], self._computed[program.key]

    def with_batch_sizes(
        self, emitter: ModelEmitter, values: list[np.ndarray]
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
        emitter = ModelEmitter(self._strict, self._as_products, batch, given)
        emitter.model(self._rebuild(parameters).record(*inputs, **kwargs))
        self._found.append(emitter)
        emitter.check(emitter.problems)
        return emitter.arrays


def _hinted(emitter: ModelEmitter) -> str:
    """Return the hint as a sentence behind another one."""
    return f" {emitter.hint[0].upper()}{emitter.hint[1:]}." if emitter.hint else ""


def _name_of(index: int, emitter: Emitter) -> str:
    """Return the name of the node or tensor that has a deferred array."""
    owners = [*(fields for _, fields in emitter.nodes), *emitter.tensors.values()]
    return next((f["name"] for f in owners if index in indices(tuple(f.values()))), "a condition")
