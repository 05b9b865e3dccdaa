"""Commands, run in this process or in processes of their own, which are started and collected together and do not
outlive their test."""

import atexit
import contextlib
import ctypes
import functools
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple
from unittest import mock

import pytest

from jvitmoe.commands import cli

ROOT = Path(__file__).resolve().parents[1]
INHERITED = dict(os.environ)  # now: some packages set variables when they are imported
HANGS = 600  # seconds after which a process is given up, on a machine that does much besides
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = itertools.count(20_000 + 1_000 * (WORKER % 12) + os.getpid() % 500)  # a thousand for each worker
SET_CHILD_SUBREAPER = 36  # of prctl: an orphan below this process becomes its child


class Forked:
    """A process forked by the server, with what the tests use of subprocess.Popen."""

    def __init__(self, pid: int, args: Sequence[str]) -> None:
        self.pid, self.args, self.returncode = pid, args, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Started(NamedTuple):
    process: subprocess.Popen | Forked
    out: IO[str]
    err: IO[str]
    began: float


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float  # from start to end, without the time that a busy machine kept it from running


def call(main: Callable[[list[str]], Any], *arguments: object) -> tuple[int, str, str]:
    """Returns (exit code, stdout, stderr) of a command that is run in this process, 200 columns wide."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["command.py", *map(str, arguments)]
    width = {"COLUMNS": "200"}
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    try:
        with streams[0], streams[1], mock.patch.dict(os.environ, width), pytest.raises(SystemExit) as caught:
            cli.run(main)
    finally:
        sys.argv = before
    return int(caught.value.code), out.getvalue(), err.getvalue()


def succeed(main: Callable[[list[str]], Any], *arguments: object) -> str:
    """Returns what a command prints that must end without an error or a warning of Python."""
    code, out, err = call(main, *arguments)
    assert (code, err) == (0, "")
    return out


def refused(main: Callable[[list[str]], Any], *arguments: object) -> str:
    """Returns the one line of a command that must refuse its input."""
    code, _, err = call(main, *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ")
    return err


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process with that many CPU devices, fast to compile."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**INHERITED, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "COLUMNS": "200"}


def free_port() -> int:
    """Returns a port that no other test gets, from below those that the system gives to connections."""
    while True:
        port = next(PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@functools.cache
def _server() -> tuple[subprocess.Popen, dict[str, str]]:
    """Returns the process that forks others, and its environment."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)
    env = environment()
    command = [sys.executable, str(Path(__file__).with_name("forkserver.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # NumPy's OpenBLAS would start threads.
    server = subprocess.Popen(command, env={**env, "OPENBLAS_NUM_THREADS": "1"}, cwd=ROOT, **pipes)
    atexit.register(server.communicate)
    return server, env


def start(command: Sequence[object], env: Mapping[str, str] | None = None, cold: bool = False) -> Started:
    """Starts one process, for `collect`: forked if it is Python's and its environment differs from that of the server
    in nothing but XLA_FLAGS, which no import reads."""
    command, env = list(map(str, command)), dict(env or environment())
    out, err = (tempfile.NamedTemporaryFile("w+") for _ in range(2))  # noqa: SIM115 (`collect` closes them)
    began = time.monotonic()
    if not cold and command[0] == sys.executable and command[1] in ("-m", "-c") and sys.platform == "linux":
        server, known = _server()
        if env | {"XLA_FLAGS": known["XLA_FLAGS"]} == known:
            request = {"command": command[1:], "environment": env, "folder": str(ROOT)}
            server.stdin.write(json.dumps(request | {"out": out.name, "err": err.name}) + "\n")
            server.stdin.flush()
            return Started(Forked(int(server.stdout.readline()), command), out, err, began)
    return Started(subprocess.Popen(command, env=env, stdout=out, stderr=err, cwd=ROOT), out, err, began)


def start_joined(count: int, command: Sequence[str], devices: int = 1) -> list[Started]:
    """Starts `command` as `count` processes of one run."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    joined = [[*command, address, f"--processes={count}", f"--process={n}"] for n in range(count)]
    return [start(one, environment(devices)) for one in joined]


def collect(started: Sequence[Started], seconds: float = HANGS) -> list[Ended]:
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


def run(command: Sequence[object], env: Mapping[str, str] | None = None, cold: bool = False) -> Ended:
    """Returns how the command ended."""
    return collect([start(command, env, cold)])[0]


def seconds(one: Started) -> float:
    """Returns how long the process has lived, without the time that a busy machine kept it from running."""
    statistics = Path(f"/proc/{one.process.pid}/schedstat")  # ns that it ran, ns that it waited for a core
    delayed = int(statistics.read_text().split()[1]) / 1e9 if statistics.exists() else 0.0
    return time.monotonic() - one.began - delayed


def wait_for_step(workdir: Path, number: int, one: Started) -> None:
    """Waits until the history of a run holds a training step from `number` on. Fails where the process ends before."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + HANGS
    while not (path.exists() and any(int(step) >= number for step in re.findall(r'"step": (\d+)', path.read_text()))):
        assert one.process.poll() is None, one.process.args
        assert time.monotonic() < deadline, f"no step {number} in time"
        time.sleep(0.005)


def wait_for_output(one: Started, text: str) -> None:
    """Waits until the process has printed `text`."""
    deadline = time.monotonic() + HANGS
    while text not in Path(one.out.name).read_text():
        assert one.process.poll() is None, one.process.args
        assert time.monotonic() < deadline, f"no {text!r} in time"
        time.sleep(0.005)


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
