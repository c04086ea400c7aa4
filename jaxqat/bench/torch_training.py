"""Training steps in PyTorch, for comparison: the same ResNet in FP32, bf16 and FX QAT on a CPU."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxqat.pipeline.models import ModelConfig
from jaxqat.pipeline.models.resnet import BOTTLENECK_DEPTHS, STAGE_SIZES

Call = Callable[[], None]


def torch_has(model: ModelConfig) -> bool:
    """Return whether this module builds the network."""
    is_resnet = model.target is None
    return (
        is_resnet
        and model.depth not in BOTTLENECK_DEPTHS
        and (model.stem, model.shortcut) == ("cifar", "conv")
    )


def torch_steps(
    model: ModelConfig, classes: int, images: np.ndarray, labels: np.ndarray
) -> dict[str, tuple[str, Call]]:
    """Return training steps on one batch of float images, by key, with their labels.

    The step in bf16 is there only if the processor has instructions for it: without, it takes ten
    times as long as FP32.

    Args:
        model: The ResNet, with basic blocks and the CIFAR stem.
        classes: Number of classes.
        images: Normalized, (batch, rows, columns, channels).
        labels: Class of each image.
    """
    torch: Any = importlib.import_module("torch")
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels.astype(np.int64))

    def step(network: Any, autocast: bool = False) -> Call:
        network = network.to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = network(x)
            torch.nn.functional.cross_entropy(logits.float(), y).backward()
            optimizer.step()

        run()
        return run

    build = _builder(torch, model, classes)
    steps = {
        "torch_fp32": ("PyTorch FP32", step(build())),
        "torch_qat": ("PyTorch QAT", step(_quantized(torch, build(), x))),
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        steps["torch_bf16"] = ("PyTorch bf16", step(build(), autocast=True))
    return steps


def _quantized(torch: Any, network: Any, x: Any) -> Any:
    quantization: Any = importlib.import_module("torch.ao.quantization")
    fx: Any = importlib.import_module("torch.ao.quantization.quantize_fx")
    mapping = quantization.get_default_qat_qconfig_mapping("x86")
    return fx.prepare_qat_fx(network.train(), mapping, (x[:1],))


def _builder(torch: Any, model: ModelConfig, classes: int) -> Callable[[], Any]:
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs: int, features: int, stride: int):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(features)
            self.relu = nn.ReLU()
            self.shortcut = nn.Sequential()
            if stride != 1 or inputs != features:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, features, 1, stride, bias=False), nn.BatchNorm2d(features)
                )

        def forward(self, x: Any) -> Any:
            y = self.relu(self.norm1(self.conv1(x)))
            return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))

    def build() -> Any:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, model.width, 3, 1, 1, bias=False), nn.BatchNorm2d(model.width)]
        layers.append(nn.ReLU())
        inputs = model.width
        for i, size in enumerate(STAGE_SIZES[model.depth]):
            for j in range(size):
                features = model.width * 2**i
                layers.append(Block(inputs, features, 2 if i and not j else 1))
                inputs = features
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
        return nn.Sequential(*layers)

    return build
