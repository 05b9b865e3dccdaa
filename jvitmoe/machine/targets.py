"""TPUs and GPUs that are not here, as XLA's compilers describe them: `v5e:4x4`, `h100:8` and `h100:8x8`.

XLA compiles for them on any CPU. No device is opened, so a training may run on the same machine.
"""

import os
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

from jvitmoe.errors import UserError, did_you_mean, one_line
from jvitmoe.extras import is_installed

GIB = 2**30
GPU_SHARE = 0.75  # of a GPU's memory that JAX takes when it starts (XLA_PYTHON_CLIENT_MEM_FRACTION)


class Gpu(NamedTuple):
    """What XLA asks of an NVIDIA GPU; the figures are those of its data sheet and of XLA's own target configurations
    (openxla/xla, `xla/backends/gpu/target_config/specs`)."""

    name: str
    memory: int  # bytes
    bandwidth: int  # of the memory, bytes/s
    capability: int  # major compute capability
    cores: int
    units: int  # float32 units of a core
    clock: float  # GHz
    cache: int  # L2, bytes
    shared: int  # memory of a core, bytes


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000, 8, 108, 64, 1.41, 41_943_040, 167_936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000, 9, 132, 128, 1.98, 52_428_800, 233_472),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4_800_000_000_000, 9, 132, 128, 1.98, 52_428_800, 233_472),
    "b200": Gpu("NVIDIA B200", 191_514_411_008, 7_672_320_000_000, 10, 148, 128, 1.965, 132_644_864, 233_472),
}
# Memory of a chip as its compiler counts it, bytes. v5p has 95.74 GiB, two cores that JAX shows as one device.
TPUS = {"v5e": int(15.75 * GIB), "v5p": int(95.74 * GIB), "v6e": int(31.25 * GIB)}
TPU_TYPES = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}

# A GpuTargetConfigProto. A block may use 1 KiB of shared memory less than a core has.
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


class Target(NamedTuple):
    """Devices to compile for."""

    kind: str  # a key of GPUS or TPUS
    shape: tuple[int, ...]  # a TPU's topology; hosts and GPUs of each host

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS

    @property
    def memory(self) -> int:
        """Bytes of a device that a program may use. XLA's TPU compiler refuses one that needs more; for a GPU it only
        warns, and JAX takes GPU_SHARE of it."""
        return int(GPUS[self.kind].memory * GPU_SHARE) if self.is_gpu else TPUS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Target:
    """Returns the target that `KIND:SHAPE` names; `h100:8` is one host. Raises UserError."""
    kind, _, shape = text.partition(":")
    kinds = (*TPUS, *GPUS)
    most = 1 if kind in GPUS else 2  # of further numbers
    if kind not in kinds or not re.fullmatch(rf"[1-9]\d{{0,4}}(x[1-9]\d{{0,4}}){{0,{most}}}", shape):
        hint = did_you_mean(kind, kinds) if kind not in kinds else ""
        example = "v5e:4x4 for 16 TPUs, h100:8 for a host of 8 GPUs, h100:8x8 for 8 such hosts"
        raise UserError(f"--target is {text!r}; it must be one of {', '.join(kinds)} and a shape: {example}{hint}")
    return Target(kind, tuple(map(int, shape.split("x"))))


def prepare(target: Target) -> None:
    """Sets the environment of the compilers, before JAX is imported. Raises UserError where one is not installed."""
    module, extra = ("jax_plugins.xla_cuda12", "gpu-compile") if target.is_gpu else ("libtpu", "tpu")
    if not is_installed(module):
        size = "0.5 GB, and 1.1 GB of cuDNN" if target.is_gpu else "0.6 GB"
        raise UserError(f"{target} needs XLA's compiler for it; pip install 'jvitmoe[{extra}]' ({size}, no device)")
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.is_gpu:
        if tuple(map(int, metadata.version("jax").split(".")[:2])) < (0, 12):
            # Without a GPU to tune on, its compiler fails on products of width 300.
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()
    else:
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process aborts on a lock file
            "TPU_ACCELERATOR_TYPE": f"{TPU_TYPES[target.kind]}-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
        }


def devices(target: Target) -> Sequence[Any]:
    """Returns the devices of a target, after `prepare`. Raises UserError where the compiler knows no such shape."""
    from jax.experimental import topologies

    try:
        if target.is_gpu:
            gpu = GPUS[target.kind]
            config = GPU_CONFIG.format(**gpu._asdict(), optin=gpu.shared - 1024)
            hosts, local = target.shape if len(target.shape) == 2 else (1, target.shape[0])
            described = topologies.get_topology_desc(
                platform="cuda", target_config=config, topology=f"1x{hosts}x{local}"
            )
        else:
            described = topologies.get_topology_desc(platform="tpu", topology_name=str(target))
    except Exception as error:  # of the plug-in, its compiler and JAX
        raise UserError(f"--target is {str(target)!r}; XLA does not know it: {one_line(error)}") from error
    return described.devices
