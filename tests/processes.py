"""Real processes on loopback, started together and collected together; none outlives its test."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process with that many CPU devices, fast to compile."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "COLUMNS": "200"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Starts one process; its output is read by `collect`."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env or environment(), stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def start_joined(count: int, command: Sequence[str]) -> list[subprocess.Popen]:
    """Starts `command` as `count` processes that join each other."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    return [start([*command, address, f"--processes={count}", f"--process={n}"]) for n in range(count)]


def collect(processes: Sequence[subprocess.Popen], seconds: float = 240) -> list[Ended]:
    """Returns how each process ended; after `seconds` all that still run are killed, and the test fails."""
    deadline, ended = time.monotonic() + seconds, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ended.append(Ended(process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ended


def train(experiment: Path, workdir: Path, *arguments: str) -> list[str]:
    """Returns the command that trains an experiment."""
    return [sys.executable, "-m", "jvitmoe.train", f"--config={experiment}", f"--workdir={workdir}", *arguments]
