"""Real processes on loopback, started together and collected together; none outlives its test."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Started(NamedTuple):
    process: subprocess.Popen
    out: IO[str]
    err: IO[str]
    began: float


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float  # from start to end, without the time that a busy machine kept it from running


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process with that many CPU devices, fast to compile."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "COLUMNS": "200"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(command: Sequence[str], env: Mapping[str, str] | None = None) -> Started:
    """Starts one process, for `collect`."""
    out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 (`collect` closes them)
    process = subprocess.Popen(command, env=env or environment(), stdout=out, stderr=err, cwd=ROOT)
    return Started(process, out, err, time.monotonic())


def start_joined(count: int, command: Sequence[str]) -> list[Started]:
    """Starts `command` as `count` processes that join each other."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    return [start([*command, address, f"--processes={count}", f"--process={n}"]) for n in range(count)]


def collect(started: Sequence[Started], seconds: float = 240) -> list[Ended]:
    """Returns how each process ended; after `seconds` all that still run are killed, and the test fails."""
    deadline = time.monotonic() + seconds
    try:
        return [_wait(one, deadline) for one in started]
    finally:
        for one in started:
            one.process.kill()
            one.process.wait()
            one.out.close()
            one.err.close()


def seconds(one: Started) -> float:
    """Returns how long the process has lived, without the time that a busy machine kept it from running."""
    statistics = Path(f"/proc/{one.process.pid}/schedstat")  # ns that it ran, ns that it waited for a core
    delayed = int(statistics.read_text().split()[1]) / 1e9 if statistics.exists() else 0.0
    return time.monotonic() - one.began - delayed


def _wait(one: Started, deadline: float) -> Ended:
    pid = one.process.pid
    while one.process.returncode is None and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        assert time.monotonic() < deadline, f"{one.process.args} still runs"
        time.sleep(0.02)
    lived = seconds(one)
    texts = []
    code = one.process.wait()
    for file in (one.out, one.err):
        file.seek(0)
        texts.append(file.read())
        file.close()
    return Ended(code, *texts, lived)


def train(experiment: Path, workdir: Path, *arguments: str) -> list[str]:
    """Returns the command that trains an experiment."""
    return [sys.executable, "-m", "jvitmoe.train", f"--config={experiment}", f"--workdir={workdir}", *arguments]
