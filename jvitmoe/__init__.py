"""Vision Transformers with randomly routed experts, averaged into one plain ViT, in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "merging"]


def __getattr__(name: str) -> Any:
    """Imports `load` (interop/classifier.py) and `merging` (experts/merge.py) on first use: `import jvitmoe` alone does
    not import JAX."""
    if name == "load":
        from jvitmoe.interop.classifier import load

        return load
    if name == "merging":
        from jvitmoe.experts import merge

        return merge
    raise AttributeError(f"module 'jvitmoe' has no attribute {name!r}")
