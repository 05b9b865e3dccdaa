"""The mesh of devices, and their description."""

import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jvitmoe.config import TrainConfig
from jvitmoe.errors import ConfigError

DATA, EXPERT = "data", "expert"
AXES = (DATA, EXPERT)
REPLICATED = PartitionSpec()
BY_DATA = PartitionSpec(DATA)  # of the rows of a streamed batch
BY_EXPERT = PartitionSpec(None, EXPERT)  # of leaves [L, E, ...]


def make_mesh(train: TrainConfig) -> Mesh:
    """Returns the mesh ("data", "expert") over the devices of all processes.

    Raises ConfigError for a platform or a number of devices not there.
    """
    try:
        devices = jax.devices(train.platform or None)
    except RuntimeError as error:
        raise ConfigError(
            f"config.train.platform is {train.platform!r}; JAX finds {jax.default_backend()} devices only; "
            "install jvitmoe[cuda12] or jvitmoe[cuda13], or set --config.train.platform=''"
        ) from error
    chosen = train.platform or os.environ.get("JAX_PLATFORMS")
    if not chosen and devices[0].platform == "cpu" and Path("/dev/nvidia0").exists():
        warnings.warn("an NVIDIA GPU is here but JAX finds only the CPU; install jvitmoe[cuda12]", RuntimeWarning, 2)
    wanted = train.devices or len(devices)
    if wanted > len(devices):
        raise ConfigError(
            f"config.train.devices is {wanted}; it must be at most {len(devices)}, the devices that are there"
        )
    if wanted < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"config.train.devices is {wanted}; it must be 0 or {len(devices)}, the devices of all processes"
        )
    if wanted % train.expert_devices:
        raise ConfigError(f"config.train.expert_devices is {train.expert_devices}; it must divide the {wanted} devices")
    shape = wanted // train.expert_devices, train.expert_devices
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted])


def describe(mesh: Mesh) -> str:
    """Returns the devices in words: number, kind, and for a CPU its model."""
    first = mesh.devices.flat[0]
    kind = first.device_kind
    if first.platform == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        kind = f"cpu ({found.group(1) if found else platform.machine()}, {os.cpu_count()} cores)"
    processes = jax.process_count()
    return f"{mesh.size} x {kind}" + (f", {processes} processes" if processes > 1 else "")


def settle(mesh: Mesh, outputs: Any) -> None:
    """Waits for `outputs` where the mesh is several CPU devices, and only there: XLA runs their collectives on one
    thread pool, which can deadlock with two programs in flight (seen on JAX 0.10)."""
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(outputs)
