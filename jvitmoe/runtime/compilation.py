"""XLA options, the compilation cache, and cost and communication read from compiled programs."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ONEDNN = "xla_cpu_experimental_onednn_custom_call"
CPU_FLAGS = Path("/proc/cpuinfo")
# Products of the CPU in bfloat16. A training step of the original's size without oneDNN takes 3.3 x (amx_bf16, two Xeon
# cores) and 2.9 x the time (avx512_bf16, two EPYC cores); docs/performance.md.
BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})


def options(dtype: Any, platform: str) -> dict[str, bool]:
    """Returns XLA's options for programs that compute in `dtype` on "cpu", "gpu" or "tpu".

    On a CPU that multiplies in bfloat16, products with a transposed operand (gradients of weights) use that only
    through oneDNN (BFLOAT16). On other CPUs oneDNN is slower. XLA_FLAGS takes precedence. A process that gets the
    option writes no more programs to the compilation cache.
    """
    if platform != "cpu" or dtype != jnp.bfloat16 or ONEDNN in os.environ.get("XLA_FLAGS", "") or not _has_bfloat16():
        return {}
    if not _is_known(ONEDNN):
        return {}
    _stop_writing()
    return {ONEDNN: True}


def _has_bfloat16() -> bool:
    try:
        return not BFLOAT16.isdisjoint(CPU_FLAGS.read_text().split())
    except OSError:
        return False


def _stop_writing() -> None:
    """Stops writes to the compilation cache: jaxlib 0.12 crashes (SIGSEGV) on serializing a program that calls
    oneDNN."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))


def for_reading(lowered: Any) -> Any:
    """Returns the compiled program of `jit(...).lower(...)`, to be read and not run. XLA's optimisations, which decide
    its text, FLOPs and memory, are done; code generation is fast and poor."""
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return lowered.compile({option: value for option, value in fast.items() if _is_known(option, value)})


@functools.cache
def _is_known(option: str, value: bool | int = True) -> bool:
    """True if the installed jaxlib has this option. An unknown option makes every compilation fail."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


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


def reduced_sizes(text: str) -> list[int]:
    """Returns the bytes, on one device, of each array that an all-reduce over several devices takes, from a compiled
    program's HLO text. Raises ValueError if there is any other collective."""
    if other := re.search(r" (all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(", text):
        raise ValueError(f"the program holds an {other[1]}")
    sizes = []
    for shape, groups in re.findall(r"= (.+?) all-reduce(?:-start)?\(.*replica_groups=(mesh.*?\}|\S+),", text):
        if _group_size(groups) == 1:
            continue
        for kind, bits, axes in re.findall(r"\b(f|bf|s|u|pred)(\d*)\[([\d,]*)\]", shape):
            elements = int(np.prod([int(n) for n in axes.split(",") if n], dtype=int))
            sizes.append(elements * (1 if kind == "pred" else int(bits) // 8))
    return sizes


def _group_size(groups: str) -> int:
    """Returns the number of devices that reduce together, from any of HLO's notations."""
    if sizes := dict(re.findall(r"'(\w+)'=(\d+)", groups)):  # mesh['data'=1,'expert'=4] {'data'}
        return int(np.prod([int(sizes[name]) for name in re.findall(r"'(\w+)'[,}]", groups)], dtype=int))
    if listed := re.match(r"\[\d+,(\d+)\]<=", groups):  # [4,1]<=[4]
        return int(listed[1])
    first = re.match(r"\{\{([\d,]+)\}", groups)  # {{0,1},{2,3}}
    return len(first[1].split(",")) if first else 2


def planned_bytes(compiled: Any) -> int:
    """Returns the memory that XLA plans for a program on one device: arguments, results that do not replace them, and
    temporaries."""
    plan = compiled.memory_analysis()
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(kept + plan.temp_size_in_bytes)
