# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Compilation of an integer graph to a function of images, for one platform."""

from collections.abc import Callable
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
from jaxqat.integer._nodes.quantize import Quantize

# By name; "cuda" and "cuda_pallas" run on the same device.
PLATFORMS: dict[str, type[Platform]] = {
    "cpu": Cpu,
    "cuda": Cuda,
    "cuda_pallas": PallasCuda,
    "tpu": Platform,
}


# (parameters, images) -> result
_Compiled = Callable[[Any, Any], Any]


class Executor:
    """An integer network as a compiled function of images.

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
        reads_codes = any(isinstance(n, Quantize) and not n.inputs for n in graph.nodes)
        self._takes_pixels = graph.input_type == "uint8" and reads_codes

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Options of `jax.jit` to compile `apply` for this platform."""
        return self._platform.compiler_options

    def __call__(self, images: Any) -> Any:
        """Return the network's result, float32.

        Several results are in tuples and dictionaries, as the model returns them
        (`graph.outputs`).

        Args:
            images: (batch, *input_shape), of the graph's `input_type`; or uint8 if it has a table.

        Raises:
            ExecutionError: If the images have another shape or type, or those of the first call
                are floats of 0 to 255 and the network's input is not.
        """
        return self._apply(self._device_parameters(), self._checked(images))

    def codes(self, images: Any) -> dict[str, Int8[Array, "..."]]:
        """Return the codes of all tensors by name, except those of fused branches."""
        return self._codes(self._device_parameters(), self._checked(images))

    def segments(self, images: Any, entries: Any) -> tuple[dict[str, Int8[Array, "..."]], Any]:
        """Return codes and the result where the readers of some tensors see given codes.

        So each part between two float islands is computed by itself. The codes that are returned
        are the computed ones, also of these tensors.

        Args:
            images: As for a call.
            entries: Codes by name, of the tensors that float islands make (`graph.entries`).
        """
        entries = {name: entries[name] for name in self.graph.entries if name in entries}
        return self._segments(self._device_parameters(), self._checked(images), entries)

    def apply(self, parameters: Any, images: Array) -> Any:
        """Compute the result as a pure function of the parameters, for callers that compile it."""

        def result(images: Array) -> Any:
            return self._platform.result(self._platform.visit(images, parameters))

        return self._platform.batched(result)(images)

    def _all_codes(self, parameters: Any, images: Array) -> dict[str, Array]:
        def codes(images: Array) -> dict[str, Array]:
            return self._codes_of(self._platform.visit(images, parameters))

        return self._platform.batched(codes)(images)

    def _by_segment(
        self, parameters: Any, images: Array, entries: Any
    ) -> tuple[dict[str, Array], Any]:
        values = self._platform.visit(images, parameters, entries)
        return self._codes_of(values), self._platform.result(values)

    def _codes_of(self, values: dict[str, Array]) -> dict[str, Array]:
        present = (name for name in self.graph.tensors if name in values)
        return {name: self._platform.codes(name, values[name]) for name in present}

    def _device_parameters(self) -> Any:
        if self._on_device is None:
            self._on_device = jax.device_put(self.parameters)
        return self._on_device

    def _checked(self, images: Any) -> Any:
        images = images if hasattr(images, "dtype") else np.asarray(images)
        if tuple(images.shape[1:]) != self.graph.input_shape:
            raise ExecutionError(
                f"images must have the shape (batch, "
                f"{', '.join(map(str, self.graph.input_shape))}), got {tuple(images.shape)}."
            )
        expected = self.graph.input_type
        if expected != "float32":
            if not jnp.issubdtype(images.dtype, jnp.integer):
                raise ExecutionError(f"inputs must be {expected}, got {images.dtype}.")
            if self._takes_pixels and images.dtype != expected:
                raise ExecutionError(
                    f"images must be {expected}, as the network was converted, got {images.dtype}."
                )
            return images
        if images.dtype == jnp.uint8 and not self.graph.takes_uint8:
            raise ExecutionError(
                "images are uint8, but the network was converted without `preprocess`: give the "
                "model's float32 input, or convert with `preprocess`."
            )
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise ExecutionError(f"images must be float32 or uint8, got {images.dtype}.")
        if images.dtype != jnp.uint8 and not self._seen_floats and not isinstance(images, Tracer):
            self._seen_floats = True  # Whoever normalizes one batch normalizes all of them.
            _check_normalized(self.graph, np.asarray(images))
        return images


def _check_normalized(graph: g.IntegerGraph, images: np.ndarray) -> None:
    """Refuse pixel values where the network's input has a far smaller range."""
    inputs = [n for n in graph.nodes if isinstance(n, Quantize) and not n.inputs]
    if not inputs or not images.size:
        return
    tensor = graph.tensors[inputs[0].output]
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
    """Return an integer network as a jitted function of images.

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
