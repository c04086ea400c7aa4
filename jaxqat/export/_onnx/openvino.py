"""Execution of an exported ONNX file in OpenVINO on the CPU.

OpenVINO multiplies the same integers, but adds the bias in float after the multiplication, and
fuses a residual addition into the convolution before it, with one rounding instead of two. So some
codes differ by one. Reading inner tensors would undo the fusion, so only results are returned.
"""

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxqat.export._onnx.builder import library


class _SignalStack(ctypes.Structure):
    """The `stack_t` of Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def _restored_signal_stack() -> Iterator[None]:
    """Restore this thread's stack for signal handlers on exit.

    A compiled model installs its own stack, and restores the previous one when it is deleted. If
    two models are deleted in the order of their creation, the thread is left with a freed stack,
    and the next signal, such as Ctrl-C, ends the process with SIGSEGV.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


def compile_openvino(model: Any, *, threads: int | None = None) -> Callable[[Any], np.ndarray]:
    """Compile a model for the CPU and return it as a function from images to its result.

    Args:
        model: An `onnx.ModelProto`.
        threads: Number of threads; None leaves it to OpenVINO.

    Raises:
        MissingPackageError: If the package `openvino` is not installed.
    """
    with warnings.catch_warnings():
        # The import forks a process, and JAX warns of forks because it has threads.
        warnings.simplefilter("ignore", RuntimeWarning)
        openvino = library("openvino")
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",  # All threads work on one batch, as in other runtimes.
        # With bfloat16 units, operations without an integer kernel would run in bfloat16.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    with _restored_signal_stack():
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options)
    return lambda images: compiled(images)[0]
