"""Vision Transformers with randomly routed experts, averaged into one plain ViT, in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "load", "merging", "train"]


def __getattr__(name: str) -> Any:
    """Imports `load` (interop/classifier.py), `merging` (experts/merge.py), `train` and `Run` (api.py) on first use:
    `import jvitmoe` alone does not import JAX."""
    if name in ("Run", "train"):
        from jvitmoe import api

        return getattr(api, name)
    if name == "load":
        from jvitmoe.interop.classifier import load

        return load
    if name == "merging":
        from jvitmoe.experts import merge

        return merge
    raise AttributeError(f"module 'jvitmoe' has no attribute {name!r}")
