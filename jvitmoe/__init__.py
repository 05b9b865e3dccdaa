"""Vision Transformers with randomly routed experts, averaged into one plain ViT, in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`jvitmoe.load` (classifier.py), found when it is asked for: importing the package starts no JAX."""
    if name == "load":
        from jvitmoe.classifier import load

        return load
    raise AttributeError(f"module 'jvitmoe' has no attribute {name!r}")
