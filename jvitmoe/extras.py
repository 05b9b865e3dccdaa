"""Packages that only some features need, the extras of pyproject.toml."""

import importlib.util


def is_installed(module: str) -> bool:
    """True if a package can be imported. A mere folder of its name is none, such as ./wandb, which runs leave behind,
    though Python imports it too."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that holds it
        return False
    return spec is not None and spec.origin is not None
