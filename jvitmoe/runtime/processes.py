"""Several processes as one run, through JAX's own runtime: joining, and leaving without hanging anybody.

Every process runs the same program on the same batch addresses; process 0 alone prints and writes files.
"""

import os
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags
from jax._src import clusters  # finding the launcher and
from jax._src import distributed as internals  # the coordinator's key-value store have no public name
from jax.experimental import multihost_utils

from jvitmoe.errors import UserError, one_line
from jvitmoe.runtime import rendezvous
from jvitmoe.runtime.heartbeat import VERDICT, Heartbeat, leave

T = TypeVar("T")
_heartbeats: list[Heartbeat] = []  # one, once several processes have joined

# Without a heartbeat, until JAX ends all. One comes every half of this, so half may have passed when a process is lost;
# the rest must be longer than `heartbeat` takes, because JAX does not say whom it lost.
HEARTBEAT_SECONDS = int(2 * VERDICT + 8)
SHUTDOWN_SECONDS = 15
GRACE_SECONDS = 5  # for JAX to connect processes that are all there


def join(values: flags.FlagValues, versions: Callable[[], Mapping[str, str]]) -> None:
    """Joins the other processes as the flags say; does nothing without such flags. Raises UserError.

    Args:
        values: the command's flags.
        versions: returns package -> version; they must be the same in all processes, as must the sources of jvitmoe.
    """
    by_hand = bool(values.coordinator)
    if not by_hand and not values.distributed:
        if values.processes != 1 or values.process != 0:
            raise UserError(f"--processes is {values.processes} without --coordinator; give --coordinator=HOST:PORT")
        return
    if values.join_seconds < 1:
        raise UserError(f"--join_seconds is {values.join_seconds}; it must be at least 1")
    if by_hand and not 0 <= values.process < values.processes:
        raise UserError(f"--process is {values.process}; it must be from 0 to {values.processes - 1}, by --processes")
    if by_hand:
        _check_address(values.coordinator)
    where = f"--coordinator={values.coordinator}" if by_hand else "what --distributed found"
    seconds = values.join_seconds + GRACE_SECONDS
    late = f"error: this process could not join at {where} within {seconds} s; check that all hosts reach each other\n"
    timer = threading.Timer(seconds, leave, (late, 2))  # JAX itself would abort, or wait for ever
    timer.daemon = True
    timer.start()
    try:
        address, count, process, device_ids = (
            (values.coordinator, values.processes, values.process, None) if by_hand else _detect(values.join_seconds)
        )
        rendezvous.meet(address, process, count, {**versions(), **rendezvous.source_hashes()}, values.join_seconds)
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=process,
            local_device_ids=device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=10 * seconds,  # the timer comes first
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        if jax.process_count() > 1:
            client = internals.global_state.client
            _heartbeats.append(Heartbeat(client, address, jax.process_index(), jax.process_count()))
    except (ValueError, RuntimeError) as error:
        found = " ".join(str(error).split())[:200]
        raise UserError(f"cannot join at {where}: {found}; check --coordinator, or start it in a job") from error
    finally:
        timer.cancel()


def _detect(seconds: int) -> tuple[str, int, int, list[int] | None]:
    """Returns (coordinator's address, number of processes, of this one, its local devices) as Slurm, Open MPI or
    Kubernetes give them. Raises ValueError where none of them started this process."""
    listed = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    address, count, process, device_ids = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"),
        None,
        None,
        [int(number) for number in listed.split(",")] if listed else None,
        None,
        seconds,
    )
    if address is None or count is None or process is None:
        raise ValueError("no Slurm, Open MPI or Kubernetes started this process")
    return address, count, process, list(device_ids) if device_ids is not None else None


def alone() -> bool:
    """Whether this process is the only one."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return alone() or jax.process_index() == 0


def wait() -> None:
    """Returns once all processes are here."""
    if not alone():
        multihost_utils.sync_global_devices("jvitmoe")


def together(work: Callable[[], T], what: str = "") -> T:
    """Returns what `work` returns once all processes have done it; where one of them raises UserError, all end.

    One that failed raises its own error, the others one that says nothing. `work` must not wait for other processes
    unless they all fail alike. A barrier, too: what process 0 wrote before it is there after it.

    Args:
        work: done by every process.
        what: must be the same in all of them, such as the config; otherwise UserError.
    """
    if alone():
        return work()
    error, result = None, None
    try:
        result = work()
    except UserError as raised:
        error = raised
    said = np.array([zlib.crc32(str(error).encode()) or 1 if error else 0, zlib.crc32(what.encode())], np.uint32)
    said_P2 = multihost_utils.process_allgather(said)
    if error:
        error.everywhere, error.known = bool((said_P2[:, 0] == said[0]).all()), True
        raise error
    if said_P2[:, 0].any():
        leave("", 2)
    if (said_P2[:, 1] != said_P2[0, 1]).any():
        differs = UserError("processes were given different settings; start them all with the same flags")
        differs.everywhere = differs.known = True
        raise differs
    return result  # type: ignore[return-value]


def one_first(work: Callable[[], T]) -> T:
    """As `together`, but process 0 does it before the others: for work that writes what they then only read."""
    found = together(lambda: work() if first() else None)
    again = together(lambda: None if first() else work())
    return found if first() else again  # type: ignore[return-value]


def stops_at(step: int) -> bool:
    """Whether SIGTERM, sent to any one process, ends the run with this step: the same answer in all processes.

    Each must ask after every step. JAX's coordinator names a step that none has passed.
    """
    return not alone() and multihost_utils.reached_preemption_sync_point(step)


def guard(main: Callable[[], Any]) -> None:
    """Runs `main`; of several processes, one that fails says so and ends, so that no other waits for it.

    Without this, a failed process would wait for the others to shut down together, and they for its part of a sum. One
    that fails because another is lost in the middle of a sum ends once it can say which.
    """
    try:
        main()
        wait()  # for process 0, which writes: one that leaves long before the others counts as lost
        _cut()
    except BaseException as error:
        if alone():
            raise
        code: Any = error.code if isinstance(error, SystemExit) else 2 if isinstance(error, UserError) else 1
        if code in (0, None) or (isinstance(error, SystemExit) and code > 128):  # all stop together: a clean end
            _cut()
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            sys.stderr.write(f"{one_line(error)}\n")
            sys.stderr.flush()
            for heartbeat in _heartbeats:
                heartbeat.tell_unless_lost(one_line(error))
        elif not (isinstance(error, UserError) and error.known):
            for heartbeat in _heartbeats:
                heartbeat.tell(one_line(error))
        who = "" if first() else f" (process {jax.process_index()} of {jax.process_count()})"
        if isinstance(error, UserError):
            leave("" if error.everywhere and not first() else f"error: {error}{who}\n", code)
        text = "" if isinstance(error, SystemExit) else traceback.format_exc()
        leave(f"{text}process {jax.process_index()} of {jax.process_count()} ends, and the others with it\n", code)


def _cut() -> None:
    for heartbeat in _heartbeats:
        heartbeat.cut()


def _check_address(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator is {address!r}; it must be HOST:PORT, such as node0:1234")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(f"--coordinator is {address!r}; its host is not known here: {error}") from error
