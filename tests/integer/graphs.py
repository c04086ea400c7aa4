"""Small random integer graphs whose codes spread over their ranges, like those of trained networks.

The reference interpreter runs a calibration batch while a graph is built, so that each tensor's
scale follows from its values. `CASES` lists the networks; `build(name, ...)` builds one.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from references import integer_graph

from jaxqat.integer import graph as g

F = np.float32


def pixels(graph, count, seed=1):
    """Return random uint8 images with correlated neighbours."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, *graph.input_shape))
    for axis in range(1, noise.ndim - 1):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)
    noise = noise / noise.std()
    return np.clip(np.round(128 + 64 * noise), 0, 255).astype(np.uint8)


def normalized(images):
    """Normalize pixels to a graph's float input: (pixel / 255 - mean) / deviation, by channel."""
    channels = np.arange(images.shape[-1]) % 3
    mean = np.array([0.49, 0.48, 0.45], F)[channels]
    inverse_deviation = np.array([4.05, 4.11, 3.82], F)[channels]
    return (images.astype(F) * F(1 / 255) - mean) * inverse_deviation


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scale, zero point, and smallest and largest code of a tensor."""

    scale: np.float32
    zero_point: int
    low: int
    high: int


class Maker:
    """Build a graph node by node. Methods return the name of their output tensor."""

    def __init__(
        self,
        shape,
        *,
        symmetric=False,
        bits=8,
        requantization: g.Requantization = "float",
        seed=0,
        batch=8,
    ):
        self.rng = np.random.default_rng(seed)
        self.symmetric, self.bits = symmetric, bits
        self.requantization: g.Requantization = requantization
        self.shape, self.tensors, self.nodes, self.codes = shape, {}, [], {}
        self.images = pixels(self, batch, seed + 1000)
        self.reals: dict[str, np.ndarray] = {g.INPUT: self.images}

    @property
    def input_shape(self):
        return self.shape

    def grid(self, values, *, relu=False, upper=None):
        """Return the recipe's grid for real values, clipped at `upper` times their maximum."""
        top = 2 ** (self.bits - 1) - 1
        low, high = float(values.min()), float(values.max())
        high = max(high, 1e-3 if relu or low == high == 0 else high)
        low = 0.0 if relu else low
        if self.symmetric:
            scale, zero, bottom = F(max(-low, high) / top), 0, -top
        else:
            low, high, bottom = min(low, 0.0), max(high, 0.0), -top - 1
            scale = F((high - low) / (2**self.bits - 1))
            zero = bottom - round(low / float(scale))
        last = top if upper is None else min(top, zero + round(upper * high / float(scale)))
        return Grid(scale, zero, zero if relu else bottom, last)

    def real(self, name):
        """Return a tensor's real values on the calibration batch."""
        tensor = self.tensors[name]
        return (self.codes[name].astype(F) - tensor.zero_point) * tensor.scale

    def emit(self, node, grid):
        """Add a node, and its output tensor unless the output is the network's real result."""
        self.nodes.append(node)
        if grid is None:
            return node.output
        fields = dataclasses.asdict(grid)
        # The shape is known after the node has run; the interpreter does not need it.
        tensor = g.Tensor(name=node.output, shape=(), **fields)
        units = self._run(node, {**self.tensors, node.output: tensor})
        self.codes[node.output] = integer_graph.stored(tensor, units)
        self.tensors[node.output] = dataclasses.replace(tensor, shape=units.shape[1:])
        return node.output

    def _run(self, node, tensors) -> np.ndarray:
        return integer_graph.step(
            node, tensors, self.codes, self.images, self.requantization, self.reals
        )

    def run_real(self, node) -> np.ndarray:
        return self._run(node, self.tensors).astype(F)

    def float_op(self, name, operation, inputs, shape, attributes=None):
        """Add an operation on real numbers; shapes hold {'batch': k}."""
        node = g.FloatOp(
            name=name, inputs=tuple(inputs), output=name, operation=operation, dtype="float32",
            attributes=attributes or {}, constants=(None,) * len(inputs), shape=shape,
        )  # fmt: skip
        self.nodes.append(node)
        self.reals[name] = self.run_real(node)
        return name

    def quantize(self, scaled=False):
        """Quantize the input; if `scaled`, shifted and scaled by channel before that."""
        channels = self.shape[-1]
        axes = (1,) * (len(self.shape) - 1)
        more = {}
        if scaled:
            sizes = (*axes, channels)
            names = g.Quantize.COEFFICIENTS
            more = {key: self.rng.normal(size=sizes).astype(F) for key in names}

        def real(images):
            values = normalized(images)
            if not scaled:
                return values
            return (values + more["shifts"]) * more["factors"] + more["terms"]

        grid = self.grid(real(self.images))
        inverse = F(1) / grid.scale
        every = np.arange(256, dtype=np.uint8).reshape(256, *axes, 1)
        every = real(np.broadcast_to(every, (256, *axes, channels))).reshape(256, channels)
        table = np.clip(np.round(every * inverse) + grid.zero_point, grid.low, grid.high)
        table = table.astype(np.int8)
        node = g.Quantize(
            name="input", inputs=(g.INPUT,), output="input", inverse=inverse, table=table, **more
        )
        return self.emit(node, grid)

    def product(self, name, x, weights_shape, **options):
        """Return a product that still lacks its multiplier, and its real values."""
        limit = 2 ** (self.bits - 1) - 1
        weights = self.rng.normal(size=weights_shape) * limit / 3
        weights = np.clip(np.round(weights), -limit, limit).astype(np.int8)
        outputs = weights_shape[-1]
        zeros = np.zeros(outputs, np.int32)
        ones = np.ones(outputs, F)
        node = g.Product(
            name=name, inputs=(x,), output=name, weights=weights, bias=zeros, multiplier=ones,
            weight_scale=ones, weight_bits=self.bits, **options,
        )  # fmt: skip
        total = integer_graph.step(node, self.tensors, self.codes)  # Real: not in `tensors`.
        spread = total.std() + 1e-6
        bias = np.round(self.rng.normal(size=outputs) * spread / 3).astype(np.int32)
        scale = self.tensors[x].scale
        weight_scale = (self.rng.uniform(0.5, 1.5, outputs) / spread / scale).astype(F)
        # A constant channel of one accumulator unit, as after a batch norm with gamma 0.
        weights[..., -1], bias[-1], weight_scale[-1] = 0, 1, F(0.7) / scale
        node = dataclasses.replace(node, weights=weights, bias=bias, weight_scale=weight_scale)
        total[..., -1] = 0
        return node, (total + bias) * (scale * weight_scale)

    def requantized(self, node, grid, output=None):
        """Add a product whose output is on a grid (None: the network's real result)."""
        scale = self.tensors[node.inputs[0]].scale
        multiplier = (scale * node.weight_scale).astype(F)
        if grid is not None:
            multiplier = (multiplier / grid.scale).astype(F)
        output = output or f"{node.name}/output"
        return self.emit(dataclasses.replace(node, multiplier=multiplier, output=output), grid)

    def conv_values(self, name, x, outputs, *, window=3, stride=1, padding=None, groups=1,
                    dilation=1):  # fmt: skip
        *spatial, inputs = self.tensors[x].shape
        rank = len(spatial)
        padding = dilation * (window - 1) // 2 if padding is None else padding
        shape = (*(window,) * rank, inputs // groups, outputs)
        return self.product(
            name, x, shape, kind="conv", strides=(stride,) * rank,
            padding=((padding, padding),) * rank, dilation=(dilation,) * rank, groups=groups,
        )  # fmt: skip

    def conv(self, name, x, outputs, *, relu=True, upper=None, **options):
        node, values = self.conv_values(name, x, outputs, **options)
        return self.requantized(node, self.grid(values, relu=relu, upper=upper))

    def dense(self, name, x, outputs, *, relu=True):
        node, values = self.product(name, x, (self.tensors[x].shape[-1], outputs), kind="dense")
        return self.requantized(node, self.grid(values, relu=relu))

    def head(self, x, outputs=5):
        node, _ = self.product("head", x, (self.tensors[x].shape[-1], outputs), kind="dense")
        return self.requantized(node, None, output="logits")

    def block(self, name, x, outputs, *, stride=1):
        """Add a basic block of a ResNet; the shortcut is a 1x1 convolution if shapes change."""
        y = self.conv(f"{name}/conv1", x, outputs, stride=stride)
        branch, values = self.conv_values(f"{name}/conv2", y, outputs)
        short = others = None
        if stride == 1 and outputs == self.tensors[x].shape[-1]:
            total = values + self.real(x)
        else:
            short, others = self.conv_values(
                f"{name}/proj", x, outputs, window=1, stride=stride, padding=0
            )
            total = values + others
        grid = self.grid(total, relu=True)
        terms = [self.requantized(branch, self.grid(values))]
        terms.append(x if short is None else self.requantized(short, self.grid(others)))
        return self.add(f"{name}/add", terms, grid)

    def add(self, name, terms, grid):
        ratios = [float(F(self.tensors[t].scale / grid.scale)) for t in terms]
        shift = min(int(np.ceil(16 - np.log2(1 + sum(ratios)))) - 1, 15)
        factors = tuple(max(round(ratio * 2**shift), 1) for ratio in ratios)
        node = g.Add(
            name=name, inputs=tuple(terms), output=f"{name}/output", factors=factors, shift=shift
        )
        return self.emit(node, grid)

    def affine(self, name, x, weights, bias, multiplier):
        """Add factors and terms by place; `multiplier` is in real units of the result."""
        node = g.Affine(
            name=name, inputs=(x,), output=f"{name}/real", weights=weights.astype(np.int32),
            bias=bias.astype(np.int32), multiplier=multiplier.astype(F),
        )  # fmt: skip
        grid = self.grid(self.run_real(node))
        multiplier = (node.multiplier / grid.scale).astype(F)
        return self.emit(
            dataclasses.replace(node, multiplier=multiplier, output=f"{name}/output"), grid
        )

    def carried(self, name, x, grid):
        multiplier = F(self.tensors[x].scale / grid.scale)
        node = g.Requantize(name=name, inputs=(x,), output=f"{name}/output", multiplier=multiplier)
        return self.emit(node, grid)

    def table(self, name, x, function, channels=False):
        tensor = self.tensors[x]
        every = (np.arange(-128, 128).astype(F) - tensor.zero_point) * tensor.scale
        every = every[:, None] if channels else every
        grid = self.grid(function(self.real(x)))
        table = np.clip(
            np.round(function(every) / grid.scale) + grid.zero_point, grid.low, grid.high
        )
        node = g.Table(
            name=name, inputs=(x,), output=f"{name}/output", table=table.astype(np.int8)
        )  # fmt: skip
        return self.emit(node, grid)

    def multiply(self, name, left, right):
        grid = self.grid(self.real(left) * self.real(right))
        multiplier = F(self.tensors[left].scale * self.tensors[right].scale) / grid.scale
        node = g.Multiply(
            name=name, inputs=(left, right), output=f"{name}/output", multiplier=multiplier
        )
        return self.emit(node, grid)

    def mat_mul(self, name, left, right, contracted, batched):
        multiplier = F(self.tensors[left].scale * self.tensors[right].scale)
        node = g.MatMul(
            name=name, inputs=(left, right), output=f"{name}/real", contracted=contracted,
            batched=batched, multiplier=multiplier,
        )  # fmt: skip
        grid = self.grid(self._run(node, self.tensors))
        multiplier = F(multiplier / grid.scale)
        node = dataclasses.replace(node, multiplier=multiplier, output=f"{name}/output")
        return self.emit(node, grid)

    def same(self, node_type, name, x, **fields):
        """Add a node whose output is on its input's grid."""
        fields |= {"name": name, "output": f"{name}/output"}
        return self.emit(node_type(inputs=(x,), **fields), self.grid_of(x))

    def grid_of(self, x):
        tensor = self.tensors[x]
        return Grid(tensor.scale, tensor.zero_point, tensor.low, tensor.high)

    def max_pool(self, name, x, window=3, stride=2, padding=1):
        rank = len(self.tensors[x].shape) - 1
        return self.same(
            g.MaxPool, name, x, window=(window,) * rank, strides=(stride,) * rank,
            padding=((padding, padding),) * rank,
        )  # fmt: skip

    def average(self, name, x, window=None, *, padding=0):
        """Add an average pool: without a window, a global one that drops the spatial axes."""
        *spatial, _ = self.tensors[x].shape
        extent = tuple(spatial) if window is None else (window,) * len(spatial)
        node = g.SumPool(
            name=name, inputs=(x,), output=f"{name}/real", window=extent, strides=extent,
            padding=((padding, padding),) * len(spatial), drop_axes=window is None,
            multiplier=self.tensors[x].scale * F(1 / np.prod(extent)),
        )  # fmt: skip
        grid = self.grid(self._run(node, self.tensors))
        multiplier = F(node.multiplier / grid.scale)
        node = dataclasses.replace(node, multiplier=multiplier, output=f"{name}/output")
        return self.emit(node, grid)

    def finish(self, output="logits"):
        if output in self.tensors:
            shape = self.tensors[output].shape
        else:
            shape = self._run(self.nodes[-1], self.tensors).shape[1:]
        return g.IntegerGraph(
            inputs=(g.Input(shape=self.shape),), tensors=self.tensors, nodes=tuple(self.nodes),
            outputs=(g.Output(name=output, shape=shape),), requantization=self.requantization,
            metadata={"labels": [f"class {i}" for i in range(shape[-1])], "origin": "a test"},
        )  # fmt: skip


def chain(m: Maker):
    """VGG-like: convolutions, a flattening, a head."""
    x = m.conv("conv1", m.quantize(), 8)
    x = m.conv("conv2", x, 12, stride=2)
    x = m.conv("conv3", x, 12, relu=False)
    x = m.same(g.Move, "flat", x, kind="reshape", shape=(int(np.prod(m.tensors[x].shape)),))
    m.head(x)
    return m.finish()


def residual(m: Maker):
    """ResNet-like: max-pool, an identity and a projected shortcut, a global average, a head."""
    x = m.max_pool("pool", m.conv("stem", m.quantize(), 8))
    x = m.block("block0", x, 8)
    x = m.block("block1", x, 12, stride=2)
    m.head(m.average("mean", x))
    return m.finish()


def depthwise(m: Maker):
    """MobileNet-like: depthwise convolutions with a bound above, a linear bottleneck."""
    x = m.conv("stem", m.quantize(), 8, stride=2, upper=0.6)
    x = m.conv("depth1", x, 8, groups=8, upper=0.5)
    short = m.conv("point1", x, 8, window=1, relu=False)
    x = m.conv("depth2", short, 16, groups=8, dilation=2, upper=0.7)
    node, values = m.conv_values("point2", x, 8, window=1)
    grid = m.grid(values + m.real(short))
    x = m.add("add", [m.requantized(node, m.grid(values)), short], grid)
    x = m.average("mean", x, 2, padding=1)
    m.head(m.same(g.Move, "flat", x, kind="reshape", shape=(int(np.prod(m.tensors[x].shape)),)))
    return m.finish()


def concat(m: Maker):
    """Inception-like: branches on one grid, one of them a requantized tensor."""
    x = m.conv("stem", m.quantize(), 8)
    (one, first), (two, second) = (
        m.conv_values("wide", x, 6),
        m.conv_values("narrow", x, 5, window=1),
    )
    grid = m.grid(np.concatenate([first, second, m.real(x)], -1))
    parts = [m.requantized(one, grid), m.requantized(two, grid), m.carried("carried", x, grid)]
    x = m.emit(g.Concat(name="join", inputs=tuple(parts), output="joined", axis=3), grid)
    x = m.conv("after", x, 8, stride=2)
    m.head(m.average("mean", x))
    return m.finish()


def mlp(m: Maker):
    """Dense layers only."""
    x = m.quantize()
    x = m.same(g.Move, "flat", x, kind="reshape", shape=(int(np.prod(m.shape)),))
    x = m.dense("dense1", x, 24)
    x = m.dense("dense2", x, 16, relu=False)
    m.head(x)
    return m.finish()


def series(m: Maker):
    """One spatial axis, and a dense layer at each position."""
    x = m.max_pool("pool", m.conv("conv1", m.quantize(), 8, window=5), padding=0)
    x = m.dense("dense", x, 8)
    x = m.conv("conv2", x, 8, dilation=2)
    m.head(m.average("mean", x))
    return m.finish()


def volume(m: Maker):
    """Three spatial axes."""
    x = m.conv("conv1", m.quantize(), 6)
    x = m.max_pool("pool", m.conv("conv2", x, 6, groups=2), window=2, padding=0)
    m.head(m.average("mean", x))
    return m.finish()


def gated(m: Maker):
    """A squeeze-and-excitation block: functions of codes, and a tensor times its gate."""
    x = m.conv("stem", m.quantize(), 8, relu=False)
    x = m.table("swish", x, lambda real: real / (1 + np.exp(-real)))
    gate = m.dense("expand", m.dense("squeeze", m.average("mean", x), 8, relu=False), 8, relu=False)
    gate = m.table("sigmoid", gate, lambda real: 1 / (1 + np.exp(-real)))
    gate = m.same(g.Move, "pixel", gate, kind="reshape", shape=(1, 1, 8))
    x = m.multiply("gate", gate, x)
    slopes = np.linspace(-0.5, 1.5, 8).astype(F)
    x = m.table("prelu", x, lambda real: np.where(real > 0, real, real * slopes), channels=True)
    x = m.multiply("square", m.conv("after", x, 6, window=1, relu=False), "after/output")
    m.head(m.average("mean2", x))
    return m.finish()


def matrices(m: Maker):
    """Attention without its softmax, and products of tensors over several axes and over one."""
    x = m.conv("stem", m.quantize(), 8, relu=False)
    rows, columns, _ = m.tensors[x].shape
    places = rows * columns
    heads = {"kind": "reshape", "shape": (places, 2, 4)}
    query, key, value = (
        m.same(g.Move, f"{name}/heads", m.conv(name, x, 8, window=1, relu=relu), **heads)
        for name, relu in (("query", False), ("key", True), ("value", False))
    )
    scores = m.mat_mul("scores", query, key, ((3,), (3,)), ((0, 2), (0, 2)))
    mixed = m.mat_mul("mixed", scores, value, ((3,), (1,)), ((0, 1), (0, 2)))
    mixed = m.same(g.Move, "back", mixed, kind="transpose", axes=(0, 2, 1, 3))
    # Heads and places are summed over; then one number for each pair of the others.
    gram = m.mat_mul("gram", mixed, query, ((2, 1), (2, 1)), ((0,), (0,)))
    flat = m.same(g.Move, "flat", gram, kind="reshape", shape=(16,))
    m.head(m.mat_mul("outer", flat, flat, ((), ()), ((0, 1), (0, 1))))
    return m.finish()


def moves(m: Maker):
    """All kinds of moves; the result is a tensor of codes."""
    x = m.conv("conv1", m.quantize(), 6, relu=False)
    x = m.same(g.Move, "pad", x, kind="pad", padding=((0, 0), (1, 2), (0, 1), (0, 2)))
    x = m.same(g.Move, "turn", x, kind="transpose", axes=(0, 2, 1, 3))
    rows, columns, _ = m.tensors[x].shape
    cut = {"starts": (0, 1, 0, 0), "stops": (-1, rows, columns, 6), "strides": (1, 2, 1, 1)}
    x = m.same(g.Move, "cut", x, kind="slice", **cut)
    x = m.same(g.Move, "mirror", x, kind="reverse", axes=(2,))
    x = m.same(g.Move, "repeat", x, kind="take", axis=2, indices=(0, 0, 1, 1, 2, 2, 3, 3))
    x = m.same(g.Move, "pick", x, kind="take", axis=3, indices=(4, 0, 1, 5, 1))
    return m.finish(m.conv("conv2", x, 4, window=1, relu=False))


def placed(m: Maker):
    """Factors and terms by place: of the input, and of codes, some of which become constants."""
    x = m.conv("stem", m.quantize(scaled=True), 6, relu=False)
    rows, columns, channels = m.tensors[x].shape
    signs = m.rng.choice([-256, 0, 256], size=(rows, 1, channels), p=[0.3, 0.2, 0.5])
    terms = m.rng.normal(size=(rows, columns, channels)) * 256 * 40
    x = m.affine("places", x, signs, terms, m.rng.uniform(1e-4, 3e-4, (1, 1, channels)))
    x = m.conv("after", x, 4, stride=2)
    x = m.same(g.Move, "flat", x, kind="reshape", shape=(int(np.prod(m.tensors[x].shape)),))
    one = np.ones((1,))
    m.head(m.affine("row", x, one, m.rng.normal(size=m.tensors[x].shape) * 20, one / 100))
    return m.finish()


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the shape of its input."""

    network: Callable[[Maker], g.IntegerGraph]
    shape: tuple[int, ...]


CASES = {
    "chain": Case(chain, (9, 8, 3)),
    "residual": Case(residual, (16, 16, 3)),
    "depthwise": Case(depthwise, (12, 16, 3)),
    "concat": Case(concat, (8, 8, 3)),
    "mlp": Case(mlp, (4, 4, 2)),
    "series": Case(series, (25, 2)),
    "volume": Case(volume, (6, 6, 4, 1)),
    "gated": Case(gated, (8, 6, 3)),
    "matrices": Case(matrices, (4, 3, 3)),
    "moves": Case(moves, (7, 6, 3)),
    "placed": Case(placed, (6, 5, 3)),
}


def build(
    name, *, symmetric=False, bits=8, requantization: g.Requantization = "float", seed=0
) -> g.IntegerGraph:
    """Build a graph by the recipe `int8` or `int8_symmetric`, with codes of `bits` bits."""
    case = CASES[name]
    return case.network(
        Maker(case.shape, symmetric=symmetric, bits=bits, requantization=requantization, seed=seed)
    )


def resnet18(width=64, size=32, *, symmetric=False, seed=0):
    """Build the graph of a CIFAR ResNet-18."""
    m = Maker((size, size, 3), symmetric=symmetric, seed=seed, batch=1)
    x = m.conv("stem", m.quantize(), width)
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            x = m.block(f"stage{stage}/block{block}", x, width << stage, stride=stride)
    m.head(m.average("mean", x), 10)
    return m.finish()
