"""Checks the processes of a run before JAX connects them: all are present, each once, with one count and the same code.

JAX aborts every process if an index is used twice, crashes if the coordinator's port is taken, and does not notice
another count or other code. So process 0 first listens on the coordinator's port itself. Every other process connects
and sends its report. Process 0 answers all of them with the same line and leaves the port to JAX.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from absl import flags

from jvitmoe.errors import UserError

GREETING = b"jvitmoe\n"
GREETS = 12.0  # seconds within which process 0 greets a connection; another program does not
LINGER = 3.0  # seconds for which process 0 still answers after a fault, so that later processes learn of it too
RETRY = 0.1


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags that connect several processes to one run."""
    flags.DEFINE_bool("distributed", False, "Join what Slurm, Open MPI or Kubernetes started.", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, to join processes by hand.", flag_values=values)
    flags.DEFINE_integer("processes", 1, "Number of processes, with --coordinator.", flag_values=values)
    flags.DEFINE_integer("process", 0, "Number of this one, from 0, with --coordinator.", flag_values=values)
    flags.DEFINE_integer("join_seconds", 20, "How long to wait for the other processes.", flag_values=values)


class Report(NamedTuple):
    """What a process sends to process 0."""

    process: int
    processes: int
    location: str  # pid and host
    code: dict[str, str]  # package -> version, source file -> hash


def source_hashes() -> dict[str, str]:
    """Returns file -> hash for every source file of this package."""
    root = Path(__file__).parents[1]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(root.rglob("*.py"))
    }


def meet(address: str, process: int, count: int, code: Mapping[str, str], seconds: float) -> None:
    """Returns when all processes are present and agree. Otherwise raises UserError, with the same reason in each.

    Args:
        address: HOST:PORT of JAX's coordinator, which must not run yet.
        process, count: index of this process, and number of all.
        code: values that must be equal in all processes.
        seconds: how long to wait for the others.
    """
    report = Report(process, count, f"pid {os.getpid()} on {socket.gethostname()}", dict(code))
    if fault := asyncio.run(_meet(address, report, seconds)):
        raise UserError(fault)


async def _meet(address: str, mine: Report, seconds: float) -> str:
    taken = (
        f"process {mine.process} of {mine.processes} cannot join at {address}: the port is taken by another program, "
        "or by a run that has all its processes; choose a free port for --coordinator"
    )
    if mine.process == 0:
        try:
            return await _host(address, mine, seconds)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return f"process 0 cannot listen at {address}: {error.strerror}; choose another port for --coordinator"
    try:  # a second process 0 is told so by the first one
        return await asyncio.wait_for(_visit(address, mine, taken), seconds if mine.process else GREETS)
    except TimeoutError:
        return _late(address, mine, seconds, "they are not all there") if mine.process else taken


async def _host(address: str, mine: Report, seconds: float) -> str:
    """Returns the fault, or "", after sending it to all that have reported."""
    reports = {0: mine}
    writers: dict[int, asyncio.StreamWriter] = {}
    verdict: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        foreign = EOFError, OSError, ValueError, TypeError, RecursionError, asyncio.LimitOverrunError
        with contextlib.closing(writer), contextlib.suppress(*foreign, asyncio.CancelledError):
            writer.write(GREETING)
            report = Report(*json.loads(await reader.readuntil()))
            if report.process not in range(report.processes):
                return
            if fault := _fault(reports, report):
                if not verdict.done():
                    verdict.set_result(fault)
                writer.write(_line(fault))
                return
            reports[report.process], writers[report.process] = report, writer
            if len(reports) == mine.processes and not verdict.done():
                verdict.set_result("")
            with contextlib.suppress(OSError):
                await reader.read()  # returns when the process has ended
            if not verdict.done():
                del reports[report.process], writers[report.process]

    server = await asyncio.start_server(receive, sock=_listen(address))
    if mine.processes == 1:
        verdict.set_result("")
    try:
        fault = await asyncio.wait_for(asyncio.shield(verdict), seconds)
    except TimeoutError:
        missing = ", ".join(str(process) for process in range(mine.processes) if process not in reports)
        fault = _late(address, mine, seconds, f"there is no process {missing}")
        verdict.set_result(fault)
    if fault:
        await asyncio.sleep(LINGER)
    server.close()
    for writer in writers.values():
        writer.write(_line(fault))
    return fault


def _listen(address: str) -> socket.socket:
    """Returns a socket that listens at the coordinator's address. Raises OSError."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "[::]:" + address.rpartition(":")[2])
    host, _, port = bind.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if host != "[::]":
        return socket.create_server((host.strip("[]"), int(port)), family=family)
    # All interfaces on one socket, so that only one of two processes gets them.
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", int(port)), family=family if both else socket.AF_INET, dualstack_ipv6=both)


async def _visit(address: str, mine: Report, taken: str) -> str:
    """Returns the answer of process 0, or `taken` if another program has the port. Retries until it can connect."""
    host, _, port = address.rpartition(":")
    while True:
        with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):  # not started yet, or ended
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            with contextlib.closing(writer):
                try:
                    if await asyncio.wait_for(reader.readexactly(len(GREETING)), GREETS) != GREETING:
                        return taken
                except TimeoutError:
                    return taken
                writer.write(_line(mine))
                return str(json.loads(await reader.readline()))
        await asyncio.sleep(RETRY)


def _fault(reports: Mapping[int, Report], new: Report) -> str:
    """Returns why a process may not join those that have reported, or ""."""
    first, name = reports[0], f"process {new.process} of {new.processes}"
    if new.processes != first.processes:
        started = f"--processes={new.processes} and process 0 with --processes={first.processes}"
        return f"process {new.process} was started with {started}; start all with the same number"
    if new.process in reports:
        locations = f"{reports[new.process].location}, and {new.location}"
        return f"{name} was started twice ({locations}); give each its own --process"
    differ = [key for key in first.code | new.code if first.code.get(key) != new.code.get(key)]
    if differ:
        listed = ", ".join(f"{key} is {new.code.get(key)} and not {first.code.get(key)}" for key in differ[:3])
        listed += f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        remedy = "install the same code and packages for all processes"
        return f"{name} ({new.location}) has other code than process 0: {listed}; {remedy}"
    return ""


def _late(address: str, mine: Report, seconds: float, problem: str) -> str:
    waited = f"process {mine.process} of {mine.processes} waited {seconds:g} s for the others at {address}"
    return f"{waited}, and {problem}; check the address and that as many processes were started as --processes says"


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
