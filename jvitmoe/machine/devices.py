"""The mesh of devices, and their description."""

import os
import platform
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jvitmoe.config import TrainConfig
from jvitmoe.errors import ConfigError, one_line

DATA, EXPERT = "data", "expert"
AXES = (DATA, EXPERT)
REPLICATED = PartitionSpec()
BY_DEVICE = PartitionSpec(AXES)  # rows of a batch


def start() -> None:
    """Starts JAX on its devices. Raises ConfigError, with JAX's reason, if they do not start."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that JAX_PLATFORMS=cuda finds a plug-in
        platforms, reason = os.environ.get("JAX_PLATFORMS", ""), one_line(error)
        remedy = "repair the driver, install jvitmoe[cuda12] or jvitmoe[cuda13], or set JAX_PLATFORMS=cpu"
        raise ConfigError(f"JAX cannot start ({reason}); JAX_PLATFORMS is {platforms!r}: {remedy}") from error


def make_mesh(train: TrainConfig, settings: str = "config.train.", found: Sequence[Any] = ()) -> Mesh:
    """Returns the mesh ("data", "expert") over the devices of all processes, or over `found`, those of a machine that
    is not here. `settings` is what the user's name of the devices begins with.

    Raises ConfigError if there are fewer devices.
    """
    if not found:
        start()
        found = jax.devices()
        if not os.environ.get("JAX_PLATFORMS") and found[0].platform == "cpu" and Path("/dev/nvidia0").exists():
            warnings.warn(
                "an NVIDIA GPU is here but JAX finds only the CPU; install jvitmoe[cuda12]", RuntimeWarning, 2
            )
        if (train.devices or len(found)) < len(found) and jax.process_count() > 1:
            rule = f"it must be 0 or {len(found)}, the devices of all processes"
            raise ConfigError(f"config.train.devices is {train.devices}; {rule}")
    count, available = train.devices or len(found), len(found)
    if count > available:
        raise ConfigError(f"{settings}devices is {count}; it must be at most {available}, the devices that JAX finds")
    if count % train.expert_devices:
        raise ConfigError(f"config.train.expert_devices is {train.expert_devices}; it must divide the {count} devices")
    shape = count // train.expert_devices, train.expert_devices
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=found[:count])


def fuses_attention(mesh: Mesh) -> bool:
    """True if the devices are GPUs of compute capability 8.0 (A100) or more, which cuDNN's fused attention needs."""
    first = mesh.devices.flat[0]
    capability = str(getattr(first, "compute_capability", ""))
    return first.platform == "gpu" and re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8.0


def to_devices(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns the array on the devices. Every process must hold all of it; each copies its own shards."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def describe(mesh: Mesh) -> str:
    """Returns number and kind of the devices, and the model of a CPU."""
    first = mesh.devices.flat[0]
    kind = first.device_kind
    if first.platform == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        kind = f"cpu ({model[1] if model else platform.machine()}, {os.cpu_count()} cores)"
    processes = jax.process_count()
    return f"{mesh.size} x {kind}" + (f", {processes} processes" if processes > 1 else "")


def wait_on_cpu(mesh: Mesh, outputs: Any) -> None:
    """Waits for `outputs` if the mesh is several CPU devices: XLA runs their collectives on one thread pool, which can
    deadlock with two programs in flight (seen on JAX 0.10)."""
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(outputs)
