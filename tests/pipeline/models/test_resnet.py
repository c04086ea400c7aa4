"""ResNets against a NumPy and a PyTorch network that share no code with them, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxqat.pipeline.models import ModelConfig, ResNet, build_model

pytestmark = pytest.mark.slow

# Odd sizes reveal padding on the wrong side, which a stride can hide for even ones.
CASES = [
    *((18, "cifar", 16), (18, "cifar", 13), (34, "imagenet", 33), (50, "imagenet", 32)),
    (20, "cifar", 13),
]
BATCH, CLASSES, WIDTH = 4, 7, 4


def shapes_of(model, size=32, channels=3):
    x = jnp.zeros((1, size, size, channels))
    return jax.eval_shape(lambda key: model.init(key, x, train=False), jax.random.key(0))


def parameter_paths(variables, collection="params"):
    leaves = jax.tree_util.tree_leaves_with_path(variables[collection])
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model)["params"]))


@pytest.mark.parametrize(
    ("config", "classes", "expected"),
    [
        # The paper's network: 1,728 stem + 147,968 + 525,568 + 2,099,712 + 8,393,728 in the four
        # stages + 128 stem norm + 5,130 head.
        (ModelConfig(), 10, 11_173_962),
        # torchvision's resnet18, resnet34 and resnet50, from its documentation.
        (ModelConfig(depth=18, stem="imagenet"), 1000, 11_689_512),
        (ModelConfig(depth=34, stem="imagenet"), 1000, 21_797_672),
        (ModelConfig(depth=50, stem="imagenet"), 1000, 25_557_032),
        # 0.27, 0.46, 0.66 and 0.85 million in He et al. 2015, table 6, which has option A.
        (ModelConfig(depth=20, width=16, shortcut="pad"), 10, 269_722),
        (ModelConfig(depth=32, width=16, shortcut="pad"), 10, 464_154),
        (ModelConfig(depth=44, width=16, shortcut="pad"), 10, 658_586),
        (ModelConfig(depth=56, width=16, shortcut="pad"), 10, 853_018),
        # With two 1x1 convolutions and their norms more: 512 + 64 + 2,048 + 128.
        (ModelConfig(depth=20, width=16), 10, 272_474),
    ],
)
def test_the_number_of_parameters_is_the_published_one(config, classes, expected):
    assert count(build_model(config, classes)) == expected


def test_layers_have_the_names_that_checkpoints_and_rules_use():
    paths = set(parameter_paths(shapes_of(build_model(ModelConfig(width=4), 10))))

    assert {"stem_conv/kernel", "stem_norm/scale", "head/kernel", "head/bias"} <= paths
    assert "stage2/block0/conv1/kernel" in paths
    assert "stage2/block0/shortcut_conv/kernel" in paths
    assert "stage1/block0/shortcut_conv/kernel" not in paths
    kernels = {path for path in paths if path.endswith("kernel")}
    assert len(kernels) == 20 + 1  # 17 + 3 convolutions and the dense layer.
    bottleneck = set(parameter_paths(shapes_of(build_model(ModelConfig(depth=50, width=4), 10))))
    assert "stage1/block0/conv3/kernel" in bottleneck
    assert "stage1/block0/shortcut_conv/kernel" in bottleneck


def random_variables(model, size, seed=0):
    """Return float64 variables with a different value for every parameter and statistic."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        spread = 0.1 if name in ("bias", "mean") else np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return rng.normal(0, spread, leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(model.clone(dtype=jnp.float32), size))


def apply_float64(model, variables, x, train):
    with jax.enable_x64(True):
        variables = jax.tree.map(jnp.asarray, variables)
        if train:
            logits, updates = model.apply(
                variables, jnp.asarray(x), train=True, mutable=["batch_stats"]
            )
            return np.asarray(logits), jax.tree.map(np.asarray, updates["batch_stats"])
        return np.asarray(model.apply(variables, jnp.asarray(x), train=False)), None


class NumpyResNet:
    """The network of the paper with sliding windows in NumPy."""

    def __init__(self, depth, stem, variables, train):
        self.depth, self.stem, self.train = depth, stem, train
        self.params = {path: np.asarray(leaf) for path, leaf in parameter_paths(variables).items()}
        self.stats = parameter_paths(variables, "batch_stats")
        self.new_stats = {}

    def conv(self, x, name, stride):
        kernel = self.params[f"{name}/kernel"]
        size = len(kernel)
        pad = (size - 1) // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
        return np.einsum("nhwcij,ijcf->nhwf", windows[:, ::stride, ::stride], kernel, optimize=True)

    def norm(self, x, name):
        mean, var = self.stats[f"{name}/mean"], self.stats[f"{name}/var"]
        if self.train:
            old_mean, old_var = mean, var
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.new_stats[f"{name}/mean"] = 0.9 * old_mean + 0.1 * mean
            self.new_stats[f"{name}/var"] = 0.9 * old_var + 0.1 * var
        normalized = (x - mean) / np.sqrt(var + 1e-5)
        return normalized * self.params[f"{name}/scale"] + self.params[f"{name}/bias"]

    def block(self, x, name, stride):
        # (convolution, its stride): the bottleneck's stride is on its 3x3.
        strides = [1, stride, 1] if self.depth == 50 else [stride, 1]
        y = x
        for i, conv_stride in enumerate(strides, 1):
            y = self.norm(self.conv(y, f"{name}/conv{i}", conv_stride), f"{name}/norm{i}")
            if i < len(strides):
                y = np.maximum(y, 0)
        if f"{name}/shortcut_conv/kernel" in self.params:
            x = self.conv(x, f"{name}/shortcut_conv", stride)
            x = self.norm(x, f"{name}/shortcut_norm")
        elif x.shape != y.shape:
            x = np.concatenate([x[:, ::2, ::2], np.zeros_like(y[..., x.shape[-1] :])], -1)
        return np.maximum(x + y, 0)

    def features(self, x):
        x = self.conv(x, "stem_conv", 2 if self.stem == "imagenet" else 1)
        x = np.maximum(self.norm(x, "stem_norm"), 0)
        if self.stem == "imagenet":
            x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
            windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
            x = windows[:, ::2, ::2].max((-1, -2))
        blocks = {18: [2, 2, 2, 2], 20: [3, 3, 3], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3]}[self.depth]
        for stage, size in enumerate(blocks, 1):
            for i in range(size):
                x = self.block(x, f"stage{stage}/block{i}", 2 if stage > 1 and i == 0 else 1)
        return x


def assert_logits_agree(logits, feature_maps, kernel, bias):
    """The network is float64 up to its head, which is float32 by design.

    With u = 2**-24: rounding and summing the p pixels of a mean costs (p + 1) u of it (they are
    not negative); the dot product over f features (f + 1) u of the sum of the terms' magnitudes,
    rounding the kernel and bias and adding the bias 3 u. The float64 part (2**-53, 50 layers) is
    thousands of times smaller.
    """
    pixels = feature_maps.shape[1] * feature_maps.shape[2]
    h = feature_maps.mean((1, 2))
    magnitude = np.abs(h) @ np.abs(kernel) + np.abs(bias)
    bound = (pixels + len(kernel) + 5) * 2**-24 * magnitude
    assert logits.dtype == np.float32
    assert np.all(np.abs(logits - (h @ kernel + bias)) <= bound)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("depth", "stem", "size"), CASES)
def test_logits_and_statistics_are_those_of_a_numpy_network(depth, stem, size, train):
    model = ResNet(depth, WIDTH, CLASSES, stem, jnp.float64)
    variables = random_variables(model, size)
    x = np.random.default_rng(1).normal(size=(BATCH, size, size, 3))

    logits, stats = apply_float64(model, variables, x, train)

    reference = NumpyResNet(depth, stem, variables, train)
    features = reference.features(x)
    head = variables["params"]["head"]
    assert_logits_agree(logits, features, head["kernel"], head["bias"])
    if train:
        new = parameter_paths({"batch_stats": stats}, "batch_stats")
        assert new.keys() == reference.new_stats.keys()
        for path, value in reference.new_stats.items():
            # Float64 throughout: sums of at most 288 terms and 1,024 pixels, some 2**-43 a layer,
            # over 50 layers that batch norm keeps from amplifying: 6e-12, with room to 1e-10.
            np.testing.assert_allclose(new[path], value, rtol=1e-10, atol=1e-10, err_msg=path)


def test_shortcuts_of_padding_are_those_of_a_numpy_network():
    model = ResNet(20, WIDTH, CLASSES, "cifar", jnp.float64, "pad")
    variables = random_variables(model, 13)
    assert not [path for path in parameter_paths(variables) if "shortcut" in path]
    x = np.random.default_rng(1).normal(size=(BATCH, 13, 13, 3))
    logits, _ = apply_float64(model, variables, x, train=False)
    features = NumpyResNet(20, "cifar", variables, train=False).features(x)
    head = variables["params"]["head"]
    assert_logits_agree(logits, features, head["kernel"], head["bias"])


def test_evaluation_uses_and_does_not_change_the_running_statistics():
    model = ResNet(18, WIDTH, CLASSES, "cifar", jnp.float64)
    variables = random_variables(model, 8)
    x = np.random.default_rng(1).normal(size=(BATCH, 8, 8, 3))

    together, _ = apply_float64(model, variables, x, train=False)
    alone = np.concatenate(
        [apply_float64(model, variables, x[i : i + 1], train=False)[0] for i in range(BATCH)]
    )

    # Float64 up to the float32 head, whose sums may be ordered by the batch size: 32 roundings.
    np.testing.assert_allclose(alone, together, rtol=0, atol=32 * 2**-24 * np.abs(together).max())


def torch_resnet(depth, width, classes, stem):
    """Return the same network in PyTorch, written like torchvision's."""
    from torch import nn  # pyright: ignore[reportMissingImports]

    def conv(inputs, outputs, kernel, stride):
        return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, features, stride):
            super().__init__()
            if depth == 50:
                plan = [(inputs, features, 1, 1), (features, features, 3, stride),
                        (features, 4 * features, 1, 1)]  # fmt: skip
            else:
                plan = [(inputs, features, 3, stride), (features, features, 3, 1)]
            layers = []
            for layer in plan:
                layers += [conv(*layer), nn.BatchNorm2d(layer[1]), nn.ReLU()]
            self.branch = nn.Sequential(*layers[:-1])
            self.outputs = plan[-1][1]
            self.downsample = None
            if stride != 1 or inputs != self.outputs:
                self.downsample = nn.Sequential(
                    conv(inputs, self.outputs, 1, stride), nn.BatchNorm2d(self.outputs)
                )

        def forward(self, x):
            shortcut = x if self.downsample is None else self.downsample(x)
            return nn.functional.relu(self.branch(x) + shortcut)

    layers = [conv(3, width, 3, 1), nn.BatchNorm2d(width), nn.ReLU()]
    if stem == "imagenet":
        layers = [conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage, size in enumerate({18: [2, 2, 2, 2], 20: [3, 3, 3]}.get(depth, [3, 4, 6, 3])):
        for i in range(size):
            block = Block(channels, width * 2**stage, 2 if stage and not i else 1)
            layers.append(block)
            channels = block.outputs
    return nn.Sequential(nn.Sequential(*layers), nn.Linear(channels, classes)).double()


def copy_weights(variables, network):
    """Copy a Flax tree into a PyTorch network, in the order of computation."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    params = parameter_paths(variables)
    stats = parameter_paths(variables, "batch_stats")
    convs = [path.removesuffix("/kernel") for path in params if "conv" in path]
    # Within a stage, alphabetical order is the order of computation; the stem sorts after it.
    convs.sort(key=lambda path: (not path.startswith("stem"), path))
    modules: list[Any] = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert len(modules) == 2 * len(convs)
    with torch.no_grad():
        for path, conv, norm in zip(convs, modules[::2], modules[1::2], strict=True):
            conv.weight.copy_(torch.from_numpy(params[f"{path}/kernel"].transpose(3, 2, 0, 1)))
            name = path.replace("conv", "norm")
            norm.weight.copy_(torch.from_numpy(params[f"{name}/scale"]))
            norm.bias.copy_(torch.from_numpy(params[f"{name}/bias"]))
            norm.running_mean.copy_(torch.from_numpy(stats[f"{name}/mean"]))
            norm.running_var.copy_(torch.from_numpy(stats[f"{name}/var"]))
        network[1].weight.copy_(torch.from_numpy(params["head/kernel"].T))
        network[1].bias.copy_(torch.from_numpy(params["head/bias"]))
    return {path.replace("conv", "norm"): n for path, n in zip(convs, modules[1::2], strict=True)}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("depth", "stem", "size"), CASES)
def test_logits_and_statistics_are_those_of_a_pytorch_network(depth, stem, size, train):
    torch = pytest.importorskip(
        "torch", reason="PyTorch is no dependency; NumPy's test always runs"
    )
    model = ResNet(depth, WIDTH, CLASSES, stem, jnp.float64)
    variables = random_variables(model, size)
    x = np.random.default_rng(1).normal(size=(BATCH, size, size, 3))
    network = torch_resnet(depth, WIDTH, CLASSES, stem).train(train)
    norms = copy_weights(variables, network)
    counts = {}
    for name, norm in norms.items():
        norm.register_forward_hook(
            lambda _, args, __, name=name: counts.update({name: args[0].numel() / args[0].shape[1]})
        )

    logits, stats = apply_float64(model, variables, x, train)
    with torch.no_grad():
        features = network[0](torch.from_numpy(x.transpose(0, 3, 1, 2)))

    head = variables["params"]["head"]
    maps = features.numpy().transpose(0, 2, 3, 1)
    assert_logits_agree(logits, maps, head["kernel"], head["bias"])
    if train:
        old = parameter_paths(variables, "batch_stats")
        new = parameter_paths({"batch_stats": stats}, "batch_stats")
        for name, norm in norms.items():
            # PyTorch stores the unbiased variance, n / (n - 1) of the one it normalizes with.
            n, old_var = counts[name], old[f"{name}/var"]
            unbiased = 0.9 * old_var + (new[f"{name}/var"] - 0.9 * old_var) * n / (n - 1)
            # As for the NumPy network; n of 4 and more makes the correction at most 4 / 3.
            np.testing.assert_allclose(unbiased, norm.running_var, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(
                new[f"{name}/mean"], norm.running_mean, rtol=1e-10, atol=1e-10
            )


def test_bfloat16_is_the_precision_of_every_convolution_but_of_no_variable():
    model = build_model(ModelConfig(width=WIDTH), CLASSES, dtype=jnp.bfloat16)
    x = jnp.ones((2, 8, 8, 3))
    variables = shapes_of(model, 8)

    def step(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    logits, updates = jax.eval_shape(step, variables, x)
    text = str(jax.make_jaxpr(step)(variables, x))
    convs = [line for line in text.splitlines() if "conv_general_dilated[" in line]

    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, updates))} == {jnp.dtype("float32")}
    assert len(convs) == 20
    assert all(":bf16[" in line for line in convs)


def test_initial_kernels_have_the_variances_of_pytorchs():
    model = build_model(ModelConfig(width=16), 10)
    x = jnp.zeros((1, 8, 8, 3))
    variables = jax.jit(lambda key: model.init(key, x, train=False))(jax.random.key(0))
    params = parameter_paths(variables)

    # 3x3 from 64 to 128 channels: kaiming_normal_(fan_out) has variance 2 / (9 * 128).
    kernel = np.asarray(params["stage4/block0/conv1/kernel"], np.float64)
    # n = 73,728 normal values: the variance's own relative deviation is sqrt(2 / n) = 0.0052.
    assert kernel.var() * 9 * 128 / 2 == pytest.approx(1, abs=5 * 0.0052)
    # Untruncated: of 73,728 normal values some are beyond 3.5 deviations (34 by expectation);
    # Flax's default stops at 2.3.
    assert np.abs(kernel).max() > 3.5 * np.sqrt(2 / (9 * 128))
    # nn.Linear: uniform to 1 / sqrt(fan_in), here of 128; 1,280 values come within 1 % of it.
    head = np.abs(np.asarray(params["head/kernel"]))
    assert 0.99 / np.sqrt(128) < head.max() <= 1 / np.sqrt(128)
    for path, leaf in params.items():
        if path.endswith(("scale", "bias")):
            np.testing.assert_array_equal(leaf, 1 if path.endswith("scale") else 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 19}, "model.depth must be one of 18, 34, 50, 20, 32, 44, 56, got 19"),
        ({"shortcut": "none"}, "model.shortcut must be 'conv' or 'pad', got 'none'"),
        ({"shortcut": "pad", "depth": 50}, "model.shortcut 'pad' is for blocks of two"),
        ({"stem": "imagenet", "depth": 20}, "model.stem must be 'cifar' for depth 20"),
        ({"width": 0}, "model.width must be an integer in 1..1024, got 0"),
        ({"width": 2.5}, "model.width must be an integer in 1..1024, got 2.5"),
        ({"stem": "foo"}, "model.stem must be 'cifar' or 'imagenet', got 'foo'"),
    ],
)
def test_an_invalid_value_is_named_by_its_dotted_key(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


def test_fewer_than_two_classes_are_an_error():
    with pytest.raises(ValueError, match="num_classes must be 2 or more, got 1"):
        build_model(ModelConfig(), 1)
