"""Float networks, written in Flax Linen; they know nothing of quantization."""

from jaxqat.pipeline.models.resnet import ModelConfig, ResNet, build_model

__all__ = ["ModelConfig", "ResNet", "build_model"]
