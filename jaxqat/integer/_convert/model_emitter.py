# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""From the evaluation of a whole model to nodes: every quantized tensor, and the results."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxqat.errors import ConversionError
from jaxqat.integer import graph as g
from jaxqat.integer._convert.emit import Emitter
from jaxqat.integer._convert.geometry import UnconvertibleError
from jaxqat.integer._convert.places import Place, result_place
from jaxqat.quant import _forms as forms
from jaxqat.quant._interpret import Evaluator
from jaxqat.quant._numerics.promotion import default_promotion
from jaxqat.quant._plan.plan import STATISTICS

_AS_IN_INFERENCE = ": convert it as in inference (train=False, or `eval()` of an NNX module)"
_STATISTICS = (
    f"it computes statistics of the batch, as batch norm does in training{_AS_IN_INFERENCE}"
)


class ModelEmitter(Emitter):
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
