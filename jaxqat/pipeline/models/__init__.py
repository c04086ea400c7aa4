"""Float networks in Flax Linen, without any code for quantization."""

from jaxqat.pipeline.models.resnet import ModelConfig, ResNet, build_model, probe_block

__all__ = ["ModelConfig", "ResNet", "build_model", "probe_block"]
