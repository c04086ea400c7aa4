"""Integer products in NumPy, written from their definitions; shares no code with the library."""

import numpy as np


def pad_spatial(x, padding):
    """Pads an NHWC array with zeros (or crops it, for negative padding)."""
    (top, bottom), (left, right) = padding
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))


def conv2d(x, w, *, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """NHWC x HWIO convolution, in the type of its operands (int64 or float64)."""
    x = pad_spatial(x, padding)
    height, width, inputs, outputs = w.shape
    rows = (x.shape[1] - dilation[0] * (height - 1) - 1) // stride[0] + 1
    columns = (x.shape[2] - dilation[1] * (width - 1) - 1) // stride[1] + 1
    out = np.zeros((x.shape[0], rows, columns, outputs), x.dtype)
    for g in range(groups):
        xs = x[..., g * inputs : (g + 1) * inputs]
        ys = slice(g * outputs // groups, (g + 1) * outputs // groups)
        for i in range(height):
            for j in range(width):
                top, left = i * dilation[0], j * dilation[1]
                window = xs[
                    :,
                    top : top + stride[0] * (rows - 1) + 1 : stride[0],
                    left : left + stride[1] * (columns - 1) + 1 : stride[1],
                ]
                out[..., ys] += window @ w[i, j][:, ys]
    return out


def affine_grid(low, high, bits=8):
    """Scale and zero point, by the definition, in float32 as they are stored."""
    low, high = min(np.float32(low), np.float32(0)), max(np.float32(high), np.float32(0))
    scale = np.float32(high - low) * np.float32(1 / (2**bits - 1))
    return scale, int(-(2 ** (bits - 1)) - np.round(low * (np.float32(1) / scale)))


def weight_codes(w, bits=8):
    """Per-output-channel symmetric codes and scales of an HWIO or IO array, in float64."""
    axes = tuple(range(w.ndim - 1))
    scale = np.abs(w.astype(np.float64)).max(axes) / (2 ** (bits - 1) - 1)
    return np.round(w / scale).astype(np.int64), scale
