"""Float networks, without any code for quantization: ResNets in Flax Linen, and the user's own."""

from jaxqat.pipeline.models.build import build_model, network_name
from jaxqat.pipeline.models.resnet import ResNet, probe_block
from jaxqat.pipeline.models.target import TargetError, check_target, source_sha256
from jaxqat.pipeline.settings.model import ModelConfig

__all__ = [
    "ModelConfig",
    "ResNet",
    "TargetError",
    "build_model",
    "check_target",
    "network_name",
    "probe_block",
    "source_sha256",
]
