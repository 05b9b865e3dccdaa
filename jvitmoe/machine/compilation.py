"""XLA options and the compilation cache."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jvitmoe.machine import programs

ONEDNN = "xla_cpu_experimental_onednn_custom_call"
# What XLA hands to YNNPACK. By default that is also a product together with what follows it. jaxlib 0.10.2 and 0.12.0.1
# then compute a batched product with a broadcast operand, times an array, summed, wrongly by many orders of magnitude:
# the derivative of a mean is such a product. Products alone are right; docs/performance.md has what this costs.
YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
PRODUCTS_ALONE = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
CPU_FLAGS = Path("/proc/cpuinfo")
# Products of the CPU in bfloat16. A training step of the original's size without oneDNN takes 3.3 x (amx_bf16, two Xeon
# cores) and 2.9 x the time (avx512_bf16, two EPYC cores); docs/performance.md.
BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})


def exact(platform: str) -> dict[str, bool | str]:
    """Returns XLA's options with which products are right on "cpu", "gpu" or "tpu" (YNNPACK). Every program that
    multiplies matrices gets them. XLA_FLAGS takes precedence. Warns where jaxlib does not know them and is wrong."""
    if platform != "cpu" or YNNPACK in os.environ.get("XLA_FLAGS", ""):
        return {}
    if programs.is_known(YNNPACK, PRODUCTS_ALONE):
        return {YNNPACK: PRODUCTS_ALONE}
    _check_products()
    return {}


def jit(function: Callable[..., Any]) -> Any:
    """Returns the function compiled with the options of `exact` for JAX's default device."""
    return jax.jit(function, compiler_options=exact(jax.default_backend()))


def of_training(dtype: Any, platform: str) -> dict[str, bool | str]:
    """Returns XLA's options for a training step that computes in `dtype`: those of `exact`, and oneDNN.

    On a CPU that multiplies in bfloat16, products with a transposed operand (gradients of weights) use that only
    through oneDNN (BFLOAT16). On other CPUs oneDNN is slower. XLA_FLAGS takes precedence. A process that gets oneDNN
    writes no more programs to the compilation cache.
    """
    found = exact(platform)
    if platform != "cpu" or dtype != jnp.bfloat16 or ONEDNN in os.environ.get("XLA_FLAGS", "") or not _has_bfloat16():
        return found
    if not programs.is_known(ONEDNN):
        return found
    _stop_writing()
    return found | {ONEDNN: True}


@functools.cache
def _check_products() -> None:
    """Warns, once, if a product with a broadcast operand is wrong on the CPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = float(jax.jit(lambda x: jnp.sum((x @ jnp.full_like(x, 0.5)) * x, -1))(jnp.ones((5, 60, 60))).max())
    if found != 1800:
        rule = f"it computes a sum of products as {found:g}, which is 1800, and does not know {YNNPACK}"
        warnings.warn(f"this jaxlib is wrong on CPUs: {rule}; install another version", RuntimeWarning, stacklevel=2)


def _has_bfloat16() -> bool:
    try:
        return not BFLOAT16.isdisjoint(CPU_FLAGS.read_text().split())
    except OSError:
        return False


def _stop_writing() -> None:
    """Stops writes to the compilation cache: jaxlib 0.12 crashes on serializing a program that calls oneDNN."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))


@contextlib.contextmanager
def cache_as_before() -> Iterator[None]:
    """Its body may use the cache; at its end other programs of the process find JAX's settings as they were."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: jax.config.values[name] for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def use_cache(alone: bool = True) -> None:
    """Keeps compiled programs on disk for the next start, in JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    Only the user may access the folder, because JAX runs what is in it. A process that is not `alone` does not use the
    user's folder: JAX writes in process 0 only, so on the next start the others of another node would miss what it
    finds. On GPUs all processes tune a program together, and the others would wait for its share of that work.
    """
    if ONEDNN in os.environ.get("XLA_FLAGS", ""):
        _stop_writing()
    if jax.config.values["jax_compilation_cache_dir"] is not None or not alone:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jvitmoe" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home folder, or none to write to: a run only compiles longer
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
