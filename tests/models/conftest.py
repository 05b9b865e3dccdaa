"""Models mix no dtypes by accident. Not set for the whole suite: Optax multiplies floats and integers."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _no_implicit_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield
