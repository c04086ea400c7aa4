# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`verify`: compare the trained network with the deployed one, tensor by tensor, on data.

The training graph in inference mode, the integer network and an exported file each give the codes
of the same tensors, and logits; `_compare` has the contract.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxqat.errors import ExecutionError
from jaxqat.integer._compare import Network, Observation, Segments, Verification, compare
from jaxqat.integer._execute.executor import Executor, make_executor
from jaxqat.integer._guard import check_graph
from jaxqat.integer._inputs import needed
from jaxqat.integer._results import flat
from jaxqat.integer.graph import IntegerGraph
from jaxqat.quant._models.batches import as_arguments, compiled, each_batch, preparing
from jaxqat.quant._models.bound import QuantizedModel, check_quantized

# From a batch to the model's arguments; None if they are the same.
Preprocess = Callable[..., Any] | None


def verify(
    model: QuantizedModel,
    *state: Any,
    graph: IntegerGraph,
    batches: Iterable[Any],
    preprocess: Preprocess = None,
    executor: Executor | None = None,
    **kwargs: Any,
) -> Verification:
    """Compare a quantized model in inference mode with its integer network.

        jaxqat.verify(model, variables, graph=graph, batches=[images], train=False)

    Args:
        model: What `jaxqat.quantize` returned.
        *state: Its variables; nothing for a model that holds them.
        graph: What `convert` returned for it.
        batches: Images, as the integer network takes them; a tuple holds several arguments.
        preprocess: Function from the images to the model's input; None if they are the same.
        executor: Executor of the integer network; None makes one for the present device.
        **kwargs: Keyword arguments of the model's call; they must select inference, as
            `train=False` does.

    Returns:
        The comparison; see its `failures`.

    Raises:
        QuantizationError: The model is not quantized, or `batches` is one array.
        ExecutionError: `graph` is no integer network, or one of another model; or the batches are
            uint8 images and there is no `preprocess`.
    """
    check_quantized(model, "verify")
    check_graph(graph, "verify", error=ExecutionError)
    trained = training_network(model, *state, preprocess=preprocess, **kwargs)
    real = float_network(model, *state, preprocess=preprocess, **kwargs)
    deployed = executor or make_executor(graph)
    if preprocess is None and graph.takes_uint8:
        batches = map(_checked, each_batch(batches))
    keywords = model.bind(*state, **kwargs).kwargs
    segments = integer_segments(deployed, **keywords) if graph.entries else None
    network = integer_network(deployed, **keywords)
    return compare(trained, network, graph, batches, real, segments)


def _checked(batch: Any) -> Any:
    """Refuse uint8 images without the function that makes the model's input of them."""
    if getattr(batch, "dtype", None) == np.uint8:
        raise ExecutionError(
            "The batches are uint8 images, which the integer network normalizes itself and the "
            "model does not: pass the function that `convert` was given, preprocess=..., to "
            "verify too."
        )
    return batch


def training_network(
    model: QuantizedModel, *state: Any, preprocess: Preprocess = None, **kwargs: Any
) -> Network:
    """Return the quantized model in inference mode."""
    arrays, rebuild = model.bind(*state, **kwargs).split_arrays()
    prepare = preparing(preprocess)

    @compiled
    def run(arrays: Any, batch: Any) -> tuple[dict[str, Any], list[Any]]:
        evaluator = rebuild(arrays).record(*prepare(as_arguments(batch)))
        return {"/".join(k): c.codes for k, c in evaluator.codes.items()}, evaluator.results

    return lambda batch: Observation(*run(arrays, batch))


def float_network(
    model: QuantizedModel, *state: Any, preprocess: Preprocess = None, **kwargs: Any
) -> Network:
    """Return the model in float, with the real values of the tensors that are quantized."""
    arrays, rebuild = model.bind(*state, **kwargs).split_arrays()
    prepare = preparing(preprocess)

    @compiled
    def run(arrays: Any, batch: Any) -> tuple[dict[str, Any], list[Any]]:
        evaluator = rebuild(arrays).observe(*prepare(as_arguments(batch)))
        return {"/".join(k): x for k, x in evaluator.observed.items()}, evaluator.results

    return lambda batch: Observation(*run(arrays, batch))


def integer_network(executor: Executor, /, **keywords: Any) -> Network:
    """Return the integer network.

    Args:
        executor: Its executor.
        **keywords: Keyword arguments of the model's call.
    """
    graph = executor.graph

    def network(batch: Any) -> Observation:
        arguments, named = needed(graph.inputs, as_arguments(batch), keywords)
        codes, result = executor.codes(*arguments, **named), executor(*arguments, **named)
        return Observation(codes, flat(graph.outputs, result))

    return network


def integer_segments(executor: Executor, /, **keywords: Any) -> Segments:
    """Return the integer network with given codes at the end of each float island."""
    graph = executor.graph

    def segments(batch: Any, entries: Any) -> Observation:
        arguments, named = needed(graph.inputs, as_arguments(batch), keywords)
        codes, result = executor.segments(entries, *arguments, **named)
        return Observation(codes, flat(graph.outputs, result))

    return segments
