"""Export targets. Each file of this folder defines a subclass of `base.Target`; the import below registers it."""

from jvitmoe.interop.targets import hf, onnx, safetensors, stablehlo, timm
from jvitmoe.interop.targets.base import TARGETS

__all__ = ["TARGETS", "hf", "onnx", "safetensors", "stablehlo", "timm"]
