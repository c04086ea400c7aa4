"""A small residual network, and its integer inference in NumPy, written from the equations.

A product gives code = clip(round((acc + b) * m) + z), with the bias rounded to accumulator units;
a sum gives clip(round(a * m_a + b * m_b + z)), with dyadic multipliers. Everything is float64 or
int64, apart from the stored float32 scales.
"""

import flax.linen as nn
import numpy as np
from references import integer_graph, integers


class Residual(nn.Module):
    """Every wiring of a ResNet: a stem with max-pool, an identity and a projected shortcut."""

    @nn.compact
    def __call__(self, x, train):
        def norm(name):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)

        def conv(features, name, **options):
            return nn.Conv(features, (3, 3), padding=1, use_bias=False, name=name, **options)

        x = nn.relu(norm("norm0")(conv(8, "conv0")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        y = nn.relu(norm("norm1")(conv(8, "conv1")(x)))
        y = norm("norm2")(conv(8, "conv2")(y))
        x = nn.relu(x + y)
        y = norm("norm3")(conv(12, "conv3", strides=2)(x))
        r = nn.Conv(12, (1, 1), strides=2, use_bias=True, name="conv4")(x)
        x = nn.relu(y + r)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


TENSORS = (
    *("conv0/input", "conv1/input", "conv2/input", "conv3/input", "head/pool", "head/input"),
    *("conv2/output", "conv3/output", "conv4/output"),
)
# Each term of a sum that nothing else reads, with the sum and the other term.
TERMS = {
    "conv2/output": ("conv3/input", "conv1/input"),
    "conv3/output": ("head/pool", "conv4/output"),
    "conv4/output": ("head/pool", "conv3/output"),
}
LAYERS = ("conv0", "conv1", "conv2", "conv3", "conv4", "head")


def randomized(variables, seed=0):
    """Variables with batch-norm parameters as training leaves them: a negative and a zero gamma."""
    import jax

    rng = np.random.default_rng(seed)
    flat, tree = jax.tree_util.tree_flatten_with_path(variables)
    leaves = []
    for path, leaf in flat:
        name = path[-1].key
        value = np.asarray(leaf)
        if name == "scale":
            value = rng.uniform(0.5, 1.5, value.shape)
            value[0], value[1] = -value[0], 0.0
        elif name in ("bias", "mean"):
            value = rng.normal(0, 0.3, value.shape)
        elif name == "var":
            value = rng.uniform(0.5, 2.0, value.shape)
        leaves.append(value.astype(np.float32))
    return jax.tree.unflatten(tree, leaves)


def pooled(x):
    """3x3 maxima at stride 2 with one row and column of padding, which never wins."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.iinfo(np.int64).min)
    rows, columns = (x.shape[1] - 3) // 2 + 1, (x.shape[2] - 3) // 2 + 1
    windows = [
        x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return np.max(windows, axis=0)


class IntegerResidual:
    """Integer inference of `Residual`; `codes` holds every quantized tensor afterwards."""

    def __init__(self, variables, ranges, *, symmetric=False):
        self.variables, self.symmetric = variables, symmetric
        self.ranges = ranges
        self.grids = {key: self._grid(*self._useful(key)) for key in TENSORS}
        self.codes = {}

    def _useful(self, key):
        """The range of a term, cut to what can change the code of its sum."""
        low, high = self.ranges[key]
        if key not in TERMS:
            return low, high
        total, other = TERMS[key]
        (total_low, total_high), (other_low, other_high) = map(self._extent, (total, other))
        total_low = np.maximum(total_low, 0)  # Behind a ReLU.
        return max(low, total_low - other_high), min(high, total_high - other_low)

    def _extent(self, key):
        """The real values of the smallest and the largest code of a tensor's whole range."""
        scale, zero = self._grid(*self.ranges[key])
        return np.float32(scale) * np.array([self.bottom - zero, 127 - zero], np.float32)

    @property
    def bottom(self):
        return -127 if self.symmetric else -128

    def _grid(self, low, high):
        if self.symmetric:
            scale = max(abs(np.float32(low)), abs(np.float32(high))) * np.float32(1 / 127)
            return scale, 0
        return integers.affine_grid(low, high)

    def _stored(self, key, steps):
        """Clips steps onto the grid of a tensor; returns its shifted codes, code - z."""
        zero = self.grids[key][1]
        self.codes[key] = np.clip(steps + zero, self.bottom, 127).astype(np.int64)
        return self.codes[key] - zero

    def _steps(self, acc, unit, gain, offset, out_scale):
        """round((acc + b) * m) for the real value gain * unit * acc + offset."""
        factor = gain * unit
        alive = np.abs(offset) < np.abs(factor) * 2**30
        bias = np.round(offset / np.where(alive, factor, 1))
        moving = np.round((acc + bias) * (factor / out_scale))
        return np.where(alive, moving, np.round(offset / out_scale)).astype(np.int64)

    def _sum(self, out, **terms):
        """round(sum of term * factor / 2**shift + z) - z, as large a shift as 16 bits allow."""
        zero = self.grids[out][1]
        ratios = [np.float32(self.grids[key][0]) / np.float32(self.grids[out][0]) for key in terms]
        shift = min(15, int(np.ceil(16 - np.log2(1 + np.sum(ratios, dtype=np.float64)))) - 1)
        factors = [int(np.round(ratio * 2.0**shift)) for ratio in ratios]
        return integer_graph.summed(terms.values(), factors, shift, zero) - zero

    def _conv(self, x, key, name, **options):
        w = np.asarray(self.variables["params"][name]["kernel"])
        codes, scale = integers.weight_codes(w)
        return integers.conv2d(x, codes, **options), scale * np.float64(self.grids[key][0])

    def _norm(self, name):
        p, s = self.variables["params"][name], self.variables["batch_stats"][name]
        gain = np.float64(p["scale"]) / np.sqrt(np.float64(s["var"]) + 1e-5)
        return gain, np.float64(p["bias"]) - np.float64(s["mean"]) * gain

    def __call__(self, image):
        """Logits of float images."""
        same = ((1, 1), (1, 1))
        scale = {key: np.float64(grid[0]) for key, grid in self.grids.items()}
        x = self._stored("conv0/input", np.round(image / scale["conv0/input"]).astype(np.int64))

        acc, unit = self._conv(x, "conv0/input", "conv0", padding=same)
        steps = self._steps(acc, unit, *self._norm("norm0"), scale["conv1/input"])
        x = self._stored("conv1/input", pooled(np.maximum(steps, 0)))

        acc, unit = self._conv(x, "conv1/input", "conv1", padding=same)
        steps = self._steps(acc, unit, *self._norm("norm1"), scale["conv2/input"])
        y = self._stored("conv2/input", np.maximum(steps, 0))

        acc, unit = self._conv(y, "conv2/input", "conv2", padding=same)
        steps = self._steps(acc, unit, *self._norm("norm2"), scale["conv2/output"])
        y = self._stored("conv2/output", steps)
        steps = self._sum("conv3/input", **{"conv1/input": x, "conv2/output": y})
        x = self._stored("conv3/input", np.maximum(steps, 0))

        acc, unit = self._conv(x, "conv3/input", "conv3", padding=same, stride=(2, 2))
        steps = self._steps(acc, unit, *self._norm("norm3"), scale["conv3/output"])
        y = self._stored("conv3/output", steps)
        acc, unit = self._conv(x, "conv3/input", "conv4", stride=(2, 2))
        bias = np.float64(self.variables["params"]["conv4"]["bias"])
        steps = self._steps(acc, unit, 1.0, bias, scale["conv4/output"])
        r = self._stored("conv4/output", steps)
        steps = self._sum("head/pool", **{"conv3/output": y, "conv4/output": r})
        x = self._stored("head/pool", np.maximum(steps, 0))

        total = x.sum((1, 2))
        area = x.shape[1] * x.shape[2]
        mean = np.round(total * (scale["head/pool"] / area / scale["head/input"]))
        x = self._stored("head/input", mean.astype(np.int64))
        codes, unit = integers.weight_codes(np.asarray(self.variables["params"]["head"]["kernel"]))
        bias = np.float64(self.variables["params"]["head"]["bias"])
        factor = unit * scale["head/input"]
        return (x @ codes + np.round(bias / factor)) * factor
