"""An exported ONNX file in OpenVINO on the CPU.

OpenVINO multiplies the same integers, but adds a bias in float behind the multiplication, and fuses
a residual addition into the convolution before it, where it rounds once instead of twice: codes
differ by one in places. Asking it for tensors inside would undo that, so only results are given.
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
def _signal_stack_kept() -> Iterator[None]:
    """Keep this thread's stack for signal handlers.

    Each compiled model installs a stack of its own and, when it is deleted, the one that it found.
    Two models that are deleted in the order in which they were made leave the thread with a stack
    that is freed, and the next signal, such as Ctrl-C, ends the process with SIGSEGV.
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
    """Return a function from images, as the model takes them, to its result.

    Args:
        model: An `onnx.ModelProto`.
        threads: Of the processor; None leaves it to OpenVINO.

    Raises:
        ImportError: If the package `openvino` is not installed.
    """
    with warnings.catch_warnings():
        # Its import forks a process, which JAX, having threads, warns of.
        warnings.simplefilter("ignore", RuntimeWarning)
        openvino = library("openvino")
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",  # All threads work on one batch, as in other runtimes.
        # Processors with bfloat16 units would compute in it what has no integer kernel.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    with _signal_stack_kept():
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options)
    return lambda images: compiled(images)[0]
