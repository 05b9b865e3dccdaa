"""Vision Transformers with randomly routed experts, averaged into one plain ViT, in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "average", "load", "merging", "train"]
_FILES = {
    "Run": "api",
    "average": "commands.average",
    "load": "interop.classifier",
    "merging": "experts.merge",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    """Imports `average`, `load`, `merging` (experts/merge.py), `Run` and `train` on first use. The package alone does
    not import JAX."""
    if name not in _FILES:
        raise AttributeError(f"module 'jvitmoe' has no attribute {name!r}")
    module = importlib.import_module(f"jvitmoe.{_FILES[name]}")
    return module if name == "merging" else getattr(module, name)
