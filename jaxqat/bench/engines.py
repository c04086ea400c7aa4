"""The engines, each of which computes logits from images with a given integer network."""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxqat.bench.floats import JaxNetwork, TorchNetwork
from jaxqat.bench.timing import Call
from jaxqat.integer._execute.executor import PLATFORMS, make_executor
from jaxqat.integer.graph import IntegerGraph

Bind = Callable[[np.ndarray], Call]
"""Returns a function that computes the logits of a batch of images."""

# The reference of a result: 'float' engines are compared with each other; 'exact' ones equal the
# integer network; 'near' ones equal it except for their own rounding; 'other' ones quantize the
# float network by themselves.
Kind = Literal["float", "exact", "near", "other"]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The input of all engines.

    Attributes:
        graph: The integer network.
        threads: Number of threads of each engine on the CPU.
        calibration: Batches of images, for engines that quantize by themselves.
    """

    graph: IntegerGraph
    threads: int
    calibration: Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Engine:
    """A library and precision that can run the network.

    Attributes:
        key: Name in JSON.
        label: Displayed name.
        packages: Required packages; the version of the first is reported.
        precision: 'fp32', 'tf32', 'bf16' or 'integer'.
        kind: See `Kind`.
        make: Builds the network.
    """

    key: str
    label: str
    packages: tuple[str, ...]
    precision: str
    kind: Kind
    make: Callable[[Setup], Bind]

    @property
    def family(self) -> str:
        """Name of the library: 'jax', 'ort', 'openvino' or 'torch'."""
        return self.key.split("_")[0]

    def missing(self) -> str | None:
        """Return a required package that is not installed; None if all are."""
        return next((name for name in self.packages if not is_installed(name)), None)


def is_installed(package: str) -> bool:
    """Return whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def platform() -> str:
    """Return the platform of this machine's device: 'cpu', 'cuda' or 'tpu'."""
    name = jax.devices()[0].platform
    return "cuda" if name == "gpu" else name


def engines_of(device: str) -> list[Engine]:
    """Return the engines of a platform; the first is JAX FP32.

    On an accelerator, JAX is the only library: the others would run on the host's processor.
    """
    precisions = ("fp32", "tf32", "bf16") if device == "cuda" else ("fp32", "bf16")
    names = {"fp32": "FP32", "tf32": "TF32", "bf16": "bf16"}
    engines = [
        Engine(f"jax_{p}", f"JAX {names[p]}", ("jax",), p, "float", _make_jax_float(p))
        for p in precisions
    ]
    for name in PLATFORMS:
        if name.split("_")[0] == device:
            key = "jax_integer" + name.removeprefix(device)
            label = f"JAX integer ({name})" if device == "cuda" else "JAX integer"
            make = _make_jax_integer(name)
            engines.append(Engine(key, label, ("jax",), "integer", "exact", make))
    return engines + (CPU_ENGINES if device == "cpu" else [])


def _make_jax_float(precision: str) -> Callable[[Setup], Bind]:
    def make(setup: Setup) -> Bind:
        # Weights are arguments: in cuDNN's layout, XLA need not transpose them at every call.
        network = JaxNetwork(setup.graph, precision, outputs_first=platform() == "cuda")
        # The same compiler options as for the integer network.
        options: Any = make_executor(setup.graph).compiler_options
        apply = jax.jit(network.apply, compiler_options=options)
        arrays = network.arrays()
        return _bind_jax(lambda images: apply(arrays, images))

    return make


def _make_jax_integer(name: str) -> Callable[[Setup], Bind]:
    return lambda setup: _bind_jax(make_executor(setup.graph, platform=name))


def _bind_jax(function: Callable[[Any], jax.Array]) -> Bind:
    def bind(images: np.ndarray) -> Call:
        # Do not measure the transfer to an accelerator.
        inputs = images if platform() == "cpu" else jax.device_put(images)
        return lambda: jax.block_until_ready(function(inputs))

    return bind


def _bind_onnx(model: Any, setup: Setup, *, exact: bool) -> Bind:
    from jaxqat.export._onnx.runtime import make_session

    session = make_session(model, threads=setup.threads, exact=exact)
    (argument,) = session.get_inputs()
    return lambda images: lambda: session.run(None, {argument.name: images})[0]


def _make_onnx_float(setup: Setup) -> Bind:
    from jaxqat.export._onnx.float_network import float_model

    return _bind_onnx(float_model(setup.graph), setup, exact=False)


def _make_onnx_integer(setup: Setup) -> Bind:
    from jaxqat.export._onnx.model import onnx_model

    return _bind_onnx(onnx_model(setup.graph), setup, exact=True)


def _make_onnx_static(setup: Setup) -> Bind:
    """Quantize the float model by ONNX Runtime, prepared as its documentation recommends.

    uint8 activations, int8 weights per channel and QDQ form are fast on x86.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from jaxqat.export._onnx.float_network import float_model

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(setup.calibration)

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as folder:
        names = ("float.onnx", "prepared.onnx", "static.onnx")
        source, prepared, target = (Path(folder) / name for name in names)
        source.write_bytes(float_model(setup.graph).SerializeToString())
        # Symbolic shape inference is for transformers and needs SymPy.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )
        model = onnx.load(target)
    return _bind_onnx(model, setup, exact=False)


def _bind_openvino(model: Any, setup: Setup) -> Bind:
    from jaxqat.export._onnx.openvino import compile_openvino

    run = compile_openvino(model, threads=setup.threads)
    return lambda images: lambda: run(images)


def _make_openvino_float(setup: Setup) -> Bind:
    from jaxqat.export._onnx.float_network import float_model

    return _bind_openvino(float_model(setup.graph), setup)


def _make_openvino_integer(setup: Setup) -> Bind:
    from jaxqat.export._onnx.model import onnx_model

    return _bind_openvino(onnx_model(setup.graph), setup)


def _make_torch(setup: Setup) -> Bind:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(setup.threads)
    network = TorchNetwork(setup.graph, torch)
    arrays = network.arrays()

    def bind(images: np.ndarray) -> Call:
        inputs = torch.from_numpy(images)

        def call() -> np.ndarray:
            with torch.inference_mode():
                return network.run(arrays, inputs).numpy()

        return call

    return bind


_ORT, _OPENVINO = ("onnxruntime", "onnx"), ("openvino", "onnx")

CPU_ENGINES = [
    Engine("ort_fp32", "ONNX Runtime FP32", _ORT, "fp32", "float", _make_onnx_float),
    Engine("ort_integer", "ONNX Runtime integer", _ORT, "integer", "exact", _make_onnx_integer),
    Engine(
        "ort_static", "ONNX Runtime's quantize_static", _ORT, "integer", "other", _make_onnx_static
    ),
    Engine("openvino_fp32", "OpenVINO FP32", _OPENVINO, "fp32", "float", _make_openvino_float),
    Engine(
        "openvino_integer", "OpenVINO integer", _OPENVINO, "integer", "near", _make_openvino_integer
    ),
    Engine("torch_fp32", "PyTorch FP32", ("torch",), "fp32", "float", _make_torch),
]  # fmt: skip
