# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""An integer graph as a function of images, compiled for the platform at hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8

from jaxqat.errors import ExecutionError
from jaxqat.integer import graph as g
from jaxqat.integer._execute import Cpu, Cuda, PallasCuda, Platform
from jaxqat.integer._execute.pallas_conv import COMPUTE_CAPABILITY

# Names of platforms; "cuda" and "cuda_pallas" are two ways to run on one device.
PLATFORMS: dict[str, type[Platform]] = {
    "cpu": Cpu,
    "cuda": Cuda,
    "cuda_pallas": PallasCuda,
    "tpu": Platform,
}


# (parameters, images) -> result
_Compiled = Callable[[Any, Any], Any]


class Executor:
    """The integer network as a function.

        network = make_executor(graph)
        logits = network(images)

    Attributes:
        graph: The network.
        platform: Name of the platform it is laid out for: a key of `PLATFORMS`.
        parameters: The network's arrays, laid out for the platform; an argument of `apply`.
    """

    def __init__(self, graph: g.IntegerGraph, platform: str):
        self.graph, self.platform = graph, platform
        self._platform = PLATFORMS[platform](graph)
        self.parameters = self._platform.parameters
        options = self._platform.compiler_options
        self._apply: _Compiled = jax.jit(self.apply, compiler_options=options)
        self._codes: _Compiled = jax.jit(self._all_codes, compiler_options=options)
        self._on_device: Any = None

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Options for `jax.jit` of `apply` on this platform."""
        return self._platform.compiler_options

    def __call__(self, images: Any) -> Array:
        """Return the network's result, float32.

        Args:
            images: (batch, *input_shape), float32; uint8 if the graph has a table for it.

        Raises:
            ExecutionError: If the images have another shape or type.
        """
        return self._apply(self._device_parameters(), self._checked(images))

    def codes(self, images: Any) -> dict[str, Int8[Array, "..."]]:
        """Return the codes of every tensor that is in memory, by name; a fused branch is not."""
        return self._codes(self._device_parameters(), self._checked(images))

    def apply(self, parameters: Any, images: Array) -> Array:
        """Compute `__call__` as a pure function of the parameters, for callers that compile it."""

        def result(images: Array) -> Array:
            return self._platform.result(self._platform.visit(images, parameters))

        return self._platform.batched(result)(images)

    def _all_codes(self, parameters: Any, images: Array) -> dict[str, Array]:
        def codes(images: Array) -> dict[str, Array]:
            values = self._platform.visit(images, parameters)
            present = (name for name in self.graph.tensors if name in values)
            return {name: self._platform.codes(name, values[name]) for name in present}

        return self._platform.batched(codes)(images)

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
        if images.dtype == jnp.uint8 and self.graph.quantize.table is None:
            raise ExecutionError(
                "images are uint8, but the network was converted without `preprocess`: give the "
                "float32 input that the model takes, or convert it with `preprocess`."
            )
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise ExecutionError(f"images must be float32 or uint8, got {images.dtype}.")
        return images


def make_executor(graph: g.IntegerGraph, *, platform: str | None = None) -> Executor:
    """Return the integer network as a jitted function of images.

    The codes are the same on every platform.

    Args:
        graph: The network.
        platform: A key of `PLATFORMS`, also of a device that is not present: 'cpu', 'tpu', 'cuda'
            (cuDNN, any GPU from sm_75 on), 'cuda_pallas' (from sm_80 on). None for the present
            device.

    Raises:
        ExecutionError: If there is no such platform.
    """
    name = default_platform() if platform is None else platform
    if name not in PLATFORMS:
        raise ExecutionError(f"platform must be one of {', '.join(PLATFORMS)}, got {platform!r}.")
    return Executor(graph, name)


def default_platform() -> str:
    """Return the name of the platform of the present device."""
    device = jax.devices()[0]
    if device.platform == "gpu":
        # "9.0" and the like; other vendors' GPUs have no such kernels.
        capability = str(getattr(device, "compute_capability", "0.0")).split(".")
        numbers = tuple(int(part) for part in capability if part.isdigit())
        return "cuda_pallas" if numbers >= COMPUTE_CAPABILITY else "cuda"
    return "tpu" if device.platform == "tpu" else "cpu"
