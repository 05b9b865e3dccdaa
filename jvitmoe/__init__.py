"""Vision Transformers with randomly routed experts, averaged into one plain ViT, in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "load", "merging", "train"]


def __getattr__(name: str) -> Any:
    """Imports `load`, `merging` (experts/merge.py), `Run`, and `train`, a module that one can call, on first use. The
    package alone does not import JAX."""
    if name == "train":
        return importlib.import_module("jvitmoe.train")
    if name == "Run":
        from jvitmoe.api import Run

        return Run
    if name == "load":
        from jvitmoe.interop.classifier import load

        return load
    if name == "merging":
        from jvitmoe.experts import merge

        return merge
    raise AttributeError(f"module 'jvitmoe' has no attribute {name!r}")
