"""The two products of neural networks, convolution and dot, as integer and as float operations.

A product has the parameters of the traced equation, so every stride, dilation, grouping, layout
and batch dimension is the model's own. With codes q of the activations (zero
point z) and codes k of the weights,

    sum((q - z) * k) = sum(q * k) - z * sum(k)

(Jacob et al. 2018, arXiv:1712.05877, equation 7): `accumulate` gives the first sum and
`zero_sums` the factor of the zero point. A border holds real zeros, that is the code z, for which
both terms on the right cancel: codes are padded with 0, and weights are summed over the taps that
meet the tensor. This is one small map for the whole batch, and no tensor is copied into a larger
one.
"""

import dataclasses
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int8

from jaxqat.quant._numerics import cpu, cudnn, injection, windows
from jaxqat.quant._numerics.injection import Sums, Weights

SHIFTS = 64  # The most taps of a depthwise convolution that is a sum of shifted tensors on a CPU.
LARGEST = 128 * 128  # The largest magnitude of a product of two int8 codes.


class AnyProduct(Protocol):
    """A product as conversion, training and tables use it."""

    @property
    def kind(self) -> str:
        """'conv' or 'dense'."""
        ...

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """Axes of the weights that are summed over: they share one scale."""
        ...

    def output_axes(self, weight_rank: int) -> tuple[int, ...]:
        """Return the axes of the output that only weights of this rank have."""
        ...

    def over_output(self, values: Array) -> Array:
        """Return per-channel values of the weights' rank as they broadcast over the output."""
        ...

    @property
    def data_axes(self) -> tuple[int, ...]:
        """Axes of the activations that are summed over."""
        ...

    def data_over_output(self, values: Array) -> Array:
        """Return values of the activations' rank, size 1 along `data_axes`, likewise."""
        ...

    def accumulate(
        self,
        codes: Int8[Array, "..."],
        weights: Int8[Array, "..."],
        largest: int = LARGEST,
    ) -> Int[Array, "..."]:
        """Return the sums of code products, s8 x s8 -> s32.

        Args:
            codes: Of the activations.
            weights: Their codes.
            largest: The largest magnitude of a product of two codes, by their widths.
        """
        ...

    def inject(self, codes: Int8[Array, "..."], weights: Weights, largest: int = LARGEST) -> Sums:
        """Quantize weights and accumulate, by AQT (see `injection`).

        Args:
            codes: Of the activations.
            weights: In the shape in which they are quantized.
            largest: As of `accumulate`.
        """
        ...

    def zero_sums(self, shape: tuple[int, ...], weights: Int8[Array, "..."]) -> Int[Array, "..."]:
        """Return sums of weight codes that meet a tensor of this shape, for the output."""
        ...

    def real(self, x: Array, weights: Array) -> Array:
        """Return the float product, as the model computes it."""
        ...

    def macs(self, weight_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> int:
        """Return the multiply-accumulates for an output of this shape."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution:
    """`conv_general_dilated` with the parameters of one equation; weights on the right."""

    primitive: Any
    params: dict[str, Any]
    output_rank: int
    kind: str = "conv"

    @property
    def channel_axes(self) -> tuple[int, ...]:
        spec = self.params["dimension_numbers"].rhs_spec
        return tuple(axis for axis in range(self.output_rank) if axis != spec[0])

    def output_axes(self, weight_rank: int) -> tuple[int, ...]:
        return (self.params["dimension_numbers"].out_spec[1],)

    def over_output(self, values: Array) -> Array:
        shape = [1] * self.output_rank
        shape[self.params["dimension_numbers"].out_spec[1]] = values.size
        return values.reshape(shape)

    @property
    def data_axes(self) -> tuple[int, ...]:
        batch = self.params["dimension_numbers"].lhs_spec[0]
        return tuple(axis for axis in range(self.output_rank) if axis != batch)

    def data_over_output(self, values: Array) -> Array:
        shape = [1] * self.output_rank
        shape[self.params["dimension_numbers"].out_spec[0]] = values.size
        return values.reshape(shape)

    def accumulate(self, codes, weights, largest=LARGEST):
        by_cudnn = functools.partial(self.on_cuda, largest=largest)
        on_cpu = functools.partial(self._on_cpu, largest=largest)
        return lax.platform_dependent(
            codes, weights, cpu=on_cpu, cuda=by_cudnn, default=self._integer
        )

    def inject(self, codes, weights, largest=LARGEST):
        accumulate = functools.partial(self.accumulate, largest=largest)
        return injection.conv_general_dilated(codes, weights, accumulate)

    def zero_sums(self, shape, weights):
        borders = any(low or high for low, high in self.params["padding"])
        if not borders and all(d == 1 for d in self.params["lhs_dilation"]):
            sums = jnp.sum(weights.astype(jnp.int32), axis=self.channel_axes, keepdims=True)
            return self.over_output(sums)
        batch = self.params["dimension_numbers"].lhs_spec[0]
        ones = jnp.ones((*shape[:batch], 1, *shape[batch + 1 :]), jnp.int8)
        return self.accumulate(ones, weights, largest=128)

    def on_cuda(self, codes, weights, largest):
        """Return the sums by the rule of `cudnn`, with bounds for all codes of this width."""
        if self.is_depthwise(weights):
            return self._over_windows(codes, weights, windows.depthwise)
        groups = self.params["feature_group_count"]
        parts = self._exact_parts(weights, largest)
        if parts is None:
            dots = functools.partial(windows.dot_over_windows, groups=groups)
            return self._over_windows(codes, weights, dots)
        return self._by_parts(parts, codes, weights, functools.partial(self._integer, groups=1))

    def _exact_parts(self, weights, largest):
        """Return the parts of the convolution whose sums float32 holds exactly, if there are."""
        numbers, groups = self.params["dimension_numbers"], self.params["feature_group_count"]
        outputs, inputs = (weights.shape[axis] for axis in numbers.rhs_spec[:2])
        bounds = np.full((inputs, outputs), self.taps(weights) * largest)
        return cudnn.exact_parts(bounds, groups)

    def taps(self, weights):
        """Return the number of positions of the window."""
        spec = self.params["dimension_numbers"].rhs_spec
        return math.prod(weights.shape[axis] for axis in spec[2:])

    def _by_parts(self, parts, codes, weights, product):
        numbers = self.params["dimension_numbers"]
        return cudnn.convolve(
            [(p, weights[_at(numbers.rhs_spec, p.outputs, p.in_group)]) for p in parts],
            codes,
            product,
            axes=(numbers.lhs_spec[1], numbers.out_spec[1]),
        )

    def is_depthwise(self, weights):
        """Return whether each input channel has its own filters."""
        inputs = weights.shape[self.params["dimension_numbers"].rhs_spec[1]]
        return self.params["feature_group_count"] > 1 and inputs == 1

    def shifted(self, weights):
        """Return the function of x, in float, as a sum of shifted tensors.

        None if it is not depthwise, or has many taps.

        XLA's CPU backend takes some 30 times as long for the input gradient of a depthwise
        convolution.
        """
        if not self.is_depthwise(weights) or self.taps(weights) > SHIFTS:
            return None
        product = functools.partial(windows.depthwise, element_type=weights.dtype)
        return lambda x: self._over_windows(x, weights, product)

    def _on_cpu(self, codes, weights, largest):
        """Return the sums by the fastest way that XLA's CPU backend has for them."""
        if self.is_depthwise(weights) and self.taps(weights) <= SHIFTS:
            return self._over_windows(codes, weights, windows.depthwise)
        if not cpu.is_active():
            return self._widened(codes, weights)
        if cpu.has_matrix_units() and self.params["feature_group_count"] == 1:
            return self._over_windows(codes, weights, windows.dot_over_windows_in_parts)
        parts = self._exact_parts(weights, largest)
        if parts is None:
            return self._widened(codes, weights)
        return self._in_float(codes, weights, parts)

    def _in_float(self, codes, weights, parts):
        """Return the sums, computed in float32 (see `cpu`)."""
        groups = self.params["feature_group_count"]
        product = functools.partial(self._convolve, element_type=jnp.float32)
        if len(parts) > groups:
            product = functools.partial(product, groups=1)
            return self._by_parts(parts, codes, weights, product)
        everything = cudnn.Part(slice(None), slice(None), slice(None))
        return self._by_parts([everything], codes, weights, product)

    def _over_windows(self, codes, weights, product):
        """Return the sums of a product of padded tensors, channels last (see `windows`)."""
        lhs, rhs, out = self.params["dimension_numbers"]
        codes = jnp.transpose(codes, (lhs[0], *lhs[2:], lhs[1]))
        weights = jnp.transpose(weights, (*rhs[2:], rhs[1], rhs[0]))
        geometry = zip(self.params["padding"], self.params["lhs_dilation"], strict=True)
        borders = [(low, high, dilation - 1) for (low, high), dilation in geometry]
        padded = lax.pad(codes, np.zeros((), codes.dtype), [(0, 0, 0), *borders, (0, 0, 0)])
        sums = product(padded, weights, self.params["window_strides"], self.params["rhs_dilation"])
        return jnp.moveaxis(sums, range(sums.ndim), (out[0], *out[2:], out[1]))

    def _integer(self, codes, weights, groups=None):
        return self._convolve(codes, weights, groups)

    def _convolve(self, codes, weights, groups=None, element_type=jnp.int8):
        """Return the convolution of s8 or float32 codes; the sums of s8 ones are s32."""
        integer = element_type == jnp.int8
        return lax.conv_general_dilated(
            codes.astype(element_type),
            weights.astype(element_type),
            self.params["window_strides"],
            self.params["padding"],
            lhs_dilation=self.params["lhs_dilation"],
            rhs_dilation=self.params["rhs_dilation"],
            dimension_numbers=self.params["dimension_numbers"],
            feature_group_count=groups or self.params["feature_group_count"],
            precision=lax.Precision.DEFAULT if integer else lax.Precision.HIGHEST,
            preferred_element_type=jnp.int32 if integer else None,
        )

    def _widened(self, codes, weights):
        """Return the sums, with channels padded so that XLA's CPU backend uses a fast kernel.

        It uses its library for an s8 convolution only if one side has more than 16 channels;
        otherwise it is up to 10 times slower. 3 input channels are slow as well.
        """
        if self.params["feature_group_count"] != 1:
            return self._integer(codes, weights)
        numbers = self.params["dimension_numbers"]
        inputs, outputs = weights.shape[numbers.rhs_spec[1]], weights.shape[numbers.rhs_spec[0]]
        more_inputs = -inputs % 4
        more_outputs = 32 - outputs if max(inputs, outputs) <= 16 else 0
        codes = _pad_end(codes, {numbers.lhs_spec[1]: more_inputs})
        weights = _pad_end(
            weights, {numbers.rhs_spec[1]: more_inputs, numbers.rhs_spec[0]: more_outputs}
        )
        sums = self._integer(codes, weights)
        return lax.slice_in_dim(sums, 0, outputs, axis=numbers.out_spec[1])

    def real(self, x, weights):
        return self.primitive.bind(x, weights, **self.params)

    def macs(self, weight_shape, output_shape):
        outputs = weight_shape[self.params["dimension_numbers"].rhs_spec[0]]
        return math.prod(output_shape) * math.prod(weight_shape) // outputs


@dataclasses.dataclass(frozen=True, eq=False)
class Dot:
    """`dot_general` with the parameters of one traced equation.

    Attributes:
        primitive: JAX's dot_general primitive.
        params: The equation's parameters.
        output_rank: Rank of the result.
        weight_side: 0 if the weights are the left operand, 1 if they are the right one.
    """

    primitive: Any
    params: dict[str, Any]
    output_rank: int
    weight_side: int
    kind: str = "dense"

    @property
    def channel_axes(self) -> tuple[int, ...]:
        return tuple(self.params["dimension_numbers"][0][self.weight_side])

    def output_axes(self, weight_rank: int) -> tuple[int, ...]:
        summed, batch = (len(axes[self.weight_side]) for axes in self.params["dimension_numbers"])
        count = weight_rank - summed - batch
        first = batch if self.weight_side == 0 else self.output_rank - count
        return tuple(range(first, first + count))

    def over_output(self, values: Array) -> Array:
        return self._spread(values, self.weight_side)

    @property
    def data_axes(self) -> tuple[int, ...]:
        return tuple(self.params["dimension_numbers"][0][1 - self.weight_side])

    def data_over_output(self, values: Array) -> Array:
        return self._spread(values, 1 - self.weight_side)

    def _spread(self, values: Array, side: int) -> Array:
        """Return values of an operand's rank, size 1 along summed axes, in the output's axes."""
        summed, batch = (axes[side] for axes in self.params["dimension_numbers"])
        free = [a for a in range(values.ndim) if a not in batch and a not in summed]
        values = jnp.transpose(values, (*batch, *free, *summed))
        shape, others = values.shape, self.output_rank - len(batch) - len(free)
        at = len(batch) if side == 1 else len(batch) + len(free)
        shape = shape[: len(batch) + len(free)]
        return values.reshape(shape[:at] + (1,) * others + shape[at:])

    def _ordered(self, x, weights):
        return (weights, x) if self.weight_side == 0 else (x, weights)

    def zero_sums(self, shape, weights):
        del shape  # A dot has no borders.
        sums = jnp.sum(weights.astype(jnp.int32), axis=self.channel_axes, keepdims=True)
        return self.over_output(sums)

    def accumulate(self, codes, weights, largest=LARGEST):
        del largest  # A dot accumulates in s32 on every device.
        return lax.dot_general(
            *self._ordered(codes, weights),
            self.params["dimension_numbers"],
            precision=lax.Precision.DEFAULT,
            preferred_element_type=jnp.int32,
        )

    def inject(self, codes, weights, largest=LARGEST):
        del largest  # As above.
        numbers = self.params["dimension_numbers"]
        return injection.dot_general(codes, weights, numbers, self.weight_side)

    def real(self, x, weights):
        return self.primitive.bind(*self._ordered(x, weights), **self.params)

    def macs(self, weight_shape, output_shape):
        return math.prod(output_shape) * math.prod(weight_shape[a] for a in self.channel_axes)


def _at(spec: tuple[int, ...], outputs: slice, inputs: slice) -> tuple[slice, ...]:
    """Return the index of some output and input channels of weights."""
    index = [slice(None)] * len(spec)
    index[spec[0]], index[spec[1]] = outputs, inputs
    return tuple(index)


def _pad_end(x: Array, more: dict[int, int]) -> Array:
    if not any(more.values()):
        return x
    config = [(0, more.get(axis, 0), 0) for axis in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def backward(product: AnyProduct, x: Array, weights: Array, gradient: Array) -> tuple[Array, Array]:
    """Return the gradients of the float product at (x, weights) for that of its output."""
    output, pullback = jax.vjp(product.real, x, weights)
    gradient = gradient.astype(output.dtype)
    gradient_x, gradient_weights = pullback(gradient)
    shifted = product.shifted(weights) if isinstance(product, Convolution) else None
    if shifted is not None and cpu.is_active():
        _, pullback = jax.vjp(lambda x: shifted(x).astype(output.dtype), x)
        (gradient_x,) = pullback(gradient)
    return gradient_x, gradient_weights
