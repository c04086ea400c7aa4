"""The network of a configuration: a ResNet, or the user's own."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxqat.pipeline.models.resnet import build_resnet
from jaxqat.pipeline.models.target import build_target
from jaxqat.pipeline.settings.model import ModelConfig


def build_model(config: ModelConfig, num_classes: int, dtype: Any = jnp.float32) -> nn.Module:
    """Return the network of a configuration, to be called with images and `train`.

    Args:
        config: The ResNet, or the target and its arguments.
        num_classes: Number of logits, 2 or more.
        dtype: Compute precision, float32 or bfloat16; parameters are float32 for both.

    Raises:
        ValueError: If `num_classes` is below 2.
        TargetError: If the target cannot be used.
    """
    if config.target is not None:
        return build_target(config, num_classes, dtype)
    return build_resnet(config, num_classes, dtype)


def network_name(config: ModelConfig) -> str:
    """Return what a person calls the network."""
    if config.target is None:
        return f"ResNet-{config.depth}, width {config.width}"
    given = ", ".join(f"{name}={value!r}" for name, value in config.arguments.items())
    return f"{config.target}({given})"
