# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Compilation of an integer graph to a function of its inputs, for one platform."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int8

from jaxqat.errors import ExecutionError
from jaxqat.integer import graph as g
from jaxqat.integer._execute import Cpu, Cuda, PallasCuda, Platform
from jaxqat.integer._execute.pallas_conv import COMPUTE_CAPABILITY
from jaxqat.integer._guard import check_graph
from jaxqat.integer._inputs import Input, arrays_of, check_batch

# By name; "cuda" and "cuda_pallas" run on the same device.
PLATFORMS: dict[str, type[Platform]] = {
    "cpu": Cpu,
    "cuda": Cuda,
    "cuda_pallas": PallasCuda,
    "tpu": Platform,
}


# (parameters, inputs...) -> result
_Compiled = Callable[..., Any]


class Executor:
    """An integer network as a compiled function of the model's inputs.

        network = make_executor(graph)
        logits = network(images)

    Attributes:
        graph: Network to execute.
        platform: Name of the platform that it is compiled for, a key of `PLATFORMS`.
        parameters: Arrays of the network, laid out for the platform; an argument of `apply`.
    """

    def __init__(self, graph: g.IntegerGraph, platform: str):
        self.graph, self.platform = graph, platform
        self._platform = PLATFORMS[platform](graph)
        self.parameters = self._platform.parameters
        options = self._platform.compiler_options
        self._apply: _Compiled = jax.jit(self.apply, compiler_options=options)
        self._codes: _Compiled = jax.jit(self._all_codes, compiler_options=options)
        self._segments: Callable[..., Any] = jax.jit(self._by_segment, compiler_options=options)
        self._on_device: Any = None
        self._seen_floats = False

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Options of `jax.jit` to compile `apply` for this platform."""
        return self._platform.compiler_options

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the network's result, float32.

        Several results are in tuples and dictionaries, as the model returns them
        (`graph.outputs`).

        Args:
            *arguments: The model's inputs (`graph.inputs`), such as images: arrays of the shape
                (batch, *shape) and the type of the input; or uint8 if the network has a table.
            **keywords: Arrays that the model takes by keyword.

        Raises:
            ExecutionError: If an array is missing or has another shape or type, or the images of
                the first call are floats of 0 to 255 and the network's input is not.
        """
        return self._apply(self._device_parameters(), *self._checked(arguments, keywords))

    def codes(self, *arguments: Any, **keywords: Any) -> dict[str, Int8[Array, "..."]]:
        """Return the codes of all tensors by name, except those of fused branches."""
        return self._codes(self._device_parameters(), *self._checked(arguments, keywords))

    def segments(
        self, entries: Any, /, *arguments: Any, **keywords: Any
    ) -> tuple[dict[str, Int8[Array, "..."]], Any]:
        """Return codes and the result where the readers of some tensors see given codes.

        So each part between two float islands is computed by itself. The codes that are returned
        are the computed ones, also of these tensors.

        Args:
            entries: Codes by name, of the tensors that float islands make (`graph.entries`).
            *arguments: As for a call.
            **keywords: As for a call.
        """
        entries = {name: entries[name] for name in self.graph.entries if name in entries}
        arrays = self._checked(arguments, keywords)
        return self._segments(self._device_parameters(), entries, *arrays)

    def apply(self, parameters: Any, *inputs: Array) -> Any:
        """Compute the result as a pure function of the parameters, for callers that compile it.

        Args:
            parameters: `parameters`.
            *inputs: An array for each of `graph.inputs`.
        """

        def result(inputs: Sequence[Array]) -> Any:
            return self._platform.result(self._platform.visit(inputs, parameters))

        return self._platform.batched(result)(inputs)

    def _all_codes(self, parameters: Any, *inputs: Array) -> dict[str, Array]:
        def codes(inputs: Sequence[Array]) -> dict[str, Array]:
            return self._codes_of(self._platform.visit(inputs, parameters))

        return self._platform.batched(codes)(inputs)

    def _by_segment(
        self, parameters: Any, entries: Any, *inputs: Array
    ) -> tuple[dict[str, Array], Any]:
        values = self._platform.visit(inputs, parameters, entries)
        return self._codes_of(values), self._platform.result(values)

    def _codes_of(self, values: dict[str, Array]) -> dict[str, Array]:
        present = (name for name in self.graph.tensors if name in values)
        return {name: self._platform.codes(name, values[name]) for name in present}

    def _device_parameters(self) -> Any:
        if self._on_device is None:
            self._on_device = jax.device_put(self.parameters)
        return self._on_device

    def _checked(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Any]:
        """Return the array of each input."""
        inputs = self.graph.inputs
        try:
            given = arrays_of(inputs, arguments, keywords)
        except ValueError as error:
            raise ExecutionError(f"{error}.") from error
        arrays = [x if hasattr(x, "dtype") else np.asarray(x) for x in given]
        for each, x in zip(inputs, arrays, strict=True):
            self._check(each, x)
        try:
            check_batch(inputs, arrays)
        except ValueError as error:
            raise ExecutionError(f"{error}.") from error
        if not self._seen_floats and not any(isinstance(x, Tracer) for x in arrays):
            for each, x in zip(inputs, arrays, strict=True):
                if jnp.issubdtype(x.dtype, jnp.floating):
                    self._seen_floats = True  # Whoever normalizes one batch normalizes all of them.
                    _check_normalized(self.graph, each, np.asarray(x))
        return arrays

    def _check(self, each: Input, x: Any) -> None:
        """Check the shape and the type of an array."""
        alone = "images" if each.type in ("float32", "uint8") else "inputs"
        name = alone if len(self.graph.inputs) == 1 else f"input {each}"
        if not x.shape or tuple(x.shape[1:]) != each.shape:
            raise ExecutionError(
                f"{name} must have the shape (batch, {', '.join(map(str, each.shape))}), got "
                f"{tuple(x.shape)}."
            )
        readers = [node for node in self.graph.readers(each.name) if isinstance(node, g.Quantize)]
        if each.type == "bool" and x.dtype != jnp.bool_:
            raise ExecutionError(f"{name} must be bool, got {x.dtype}.")
        if each.type in ("int32", "uint8"):
            if not jnp.issubdtype(x.dtype, jnp.integer):
                raise ExecutionError(f"{name} must be {each.type}, got {x.dtype}.")
            if each.type == "uint8" and readers and x.dtype != each.type:
                raise ExecutionError(
                    f"{name} must be {each.type}, as the network was converted, got {x.dtype}."
                )
        if each.type != "float32":
            return
        if x.dtype == jnp.uint8 and all(node.table is None for node in readers):
            repair = ", or convert with `preprocess`" if len(self.graph.inputs) == 1 else ""
            raise ExecutionError(
                f"{name} are uint8, but the network was converted without `preprocess`: give the "
                f"model's float32 input{repair}."
            )
        if x.dtype != jnp.uint8 and not jnp.issubdtype(x.dtype, jnp.floating):
            types = "float32 or uint8" if self.graph.takes_uint8 else "float32"
            raise ExecutionError(f"{name} must be {types}, got {x.dtype}.")


def _check_normalized(graph: g.IntegerGraph, each: Input, images: np.ndarray) -> None:
    """Refuse pixel values where the network's input has a far smaller range."""
    readers = [node for node in graph.readers(each.name) if isinstance(node, g.Quantize)]
    if not readers or not images.size or readers[0].coefficients:
        return  # Or the network scales pixel values itself.
    tensor = graph.tensors[readers[0].output]
    high = float((tensor.high - tensor.zero_point) * tensor.scale)
    if images.min() < 0 or not 4 * high < images.max() <= 255:
        return
    if np.array_equal(images, np.round(images)) or images.mean() > high:
        repair = "uint8 images, which it normalizes itself, or " if graph.takes_uint8 else ""
        raise ExecutionError(
            f"images are {images.dtype} of {images.min():g} to {images.max():g}, and the network's "
            f"input reaches no further than {high:.3g}: pass {repair}images normalized as in "
            "training."
        )


def make_executor(graph: g.IntegerGraph, *, platform: str | None = None) -> Executor:
    """Return an integer network as a jitted function of the model's inputs.

    The codes are the same on every platform.

    Args:
        graph: Network to execute.
        platform: A key of `PLATFORMS`: 'cpu', 'tpu', 'cuda' (cuDNN, sm_75 or newer) or
            'cuda_pallas' (sm_80 or newer); the device need not be present. None chooses by the
            present device.

    Raises:
        ExecutionError: If `graph` is no integer network, or there is no such platform.
    """
    check_graph(graph, "make_executor", error=ExecutionError)
    name = default_platform() if platform is None else platform
    if name not in PLATFORMS:
        raise ExecutionError(f"platform must be one of {', '.join(PLATFORMS)}, got {platform!r}.")
    return Executor(graph, name)


def default_platform() -> str:
    """Return the name of the best platform for the present device."""
    device = jax.devices()[0]
    if device.platform == "gpu":
        # A string such as "9.0"; GPUs of other vendors have no Pallas kernels.
        capability = str(getattr(device, "compute_capability", "0.0")).split(".")
        numbers = tuple(int(part) for part in capability if part.isdigit())
        return "cuda_pallas" if numbers >= COMPUTE_CAPABILITY else "cuda"
    return "tpu" if device.platform == "tpu" else "cpu"
