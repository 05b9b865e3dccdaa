"""Several processes as one run, through `jax.distributed`: joining, agreeing, and ending without leaving one waiting.

Every process runs the same program on the same batches. Only process 0 prints and writes files.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags
from jax._src import clusters  # finding the launcher and
from jax._src import distributed as internals  # the coordinator's key-value store have no public name
from jax.experimental import multihost_utils

from jvitmoe.errors import UserError, one_line
from jvitmoe.runtime import devices, rendezvous
from jvitmoe.runtime.heartbeat import DETECTION_SECONDS, Heartbeat, leave

T = TypeVar("T")
_heartbeats: list[Heartbeat] = []  # one, after several processes have joined

# Seconds without a heartbeat of JAX until JAX ends all processes. It sends one every half of this, so half may have
# passed when a process is lost; the rest must be longer than DETECTION_SECONDS, because JAX does not name it.
HEARTBEAT_SECONDS = int(2 * DETECTION_SECONDS + 8)
SHUTDOWN_SECONDS = 15
GRACE_SECONDS = 5  # for JAX to connect processes that are all present
START_SECONDS = 300  # for all devices to start and meet: CUDA's libraries may come from a cold network disk


def join(values: flags.FlagValues, versions: Callable[[], Mapping[str, str]]) -> None:
    """Joins the other processes if the flags say so. Raises UserError.

    Args:
        values: the command's flags.
        versions: returns package -> version; these and the sources of jvitmoe must be equal in all processes.
    """
    by_hand = bool(values.coordinator)
    if not by_hand and not values.distributed:
        if values.processes != 1 or values.process != 0:
            name = "processes" if values.processes != 1 else "process"
            raise UserError(f"--{name} is {values[name].value} without --coordinator; give --coordinator=HOST:PORT")
        return
    if values.join_seconds < 1:
        raise UserError(f"--join_seconds is {values.join_seconds}; it must be at least 1")
    if by_hand:
        _check(values)
    where = f"--coordinator={values.coordinator}" if by_hand else "what --distributed found"
    seconds = values.join_seconds + rendezvous.LINGER + GRACE_SECONDS
    code = {**versions(), **rendezvous.source_hashes()}
    late = f"error: this process cannot join at {where} within {seconds:g} s; check that all hosts reach each other\n"
    slow = f"error: the devices of all processes have not started within {START_SECONDS} s; check their drivers\n"
    try:
        by_flags = values.coordinator, values.processes, values.process, None
        with _leaves_after(seconds, late):  # JAX would abort or wait for ever
            address, count, process, device_ids = by_flags if by_hand else _detect(values.join_seconds)
            rendezvous.meet(address, process, count, code, values.join_seconds)
            jax.distributed.initialize(
                coordinator_address=address,
                num_processes=count,
                process_id=process,
                local_device_ids=device_ids,
                cluster_detection_method="deactivate",
                initialization_timeout=int(10 * seconds),  # the timer ends it earlier
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        with _leaves_after(START_SECONDS, slow):
            devices.start()
        if jax.process_count() > 1:
            client = internals.global_state.client
            _heartbeats.append(Heartbeat(client, address, jax.process_index(), jax.process_count()))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join at {where}: {str(error)[:200]}; check --coordinator, or start it in a job"
        ) from error


@contextlib.contextmanager
def _leaves_after(seconds: float, line: str) -> Iterator[None]:
    """Ends the process with this line on standard error, and code 2, unless the block ends in time."""
    timer = threading.Timer(seconds, leave, (line, 2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check(values: flags.FlagValues) -> None:
    """Raises UserError unless --process and --coordinator are possible."""
    if values.processes < 1:
        raise UserError(f"--processes is {values.processes}; it must be at least 1")
    if not 0 <= values.process < values.processes:
        raise UserError(f"--process is {values.process}; it must be from 0 to {values.processes - 1}, by --processes")
    address = values.coordinator
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator is {address!r}; it must be HOST:PORT, such as node0:1234")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(f"--coordinator is {address!r}; its host is not known here: {error}") from error


def _detect(seconds: int) -> tuple[str, int, int, list[int] | None]:
    """Returns (coordinator's address, number of processes, index of this one, its local devices) from Slurm, Open MPI
    or Kubernetes. Raises ValueError if none of them started this process."""
    listed = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    wanted = [int(number) for number in listed.split(",")] if listed else None
    address, count, process, device_ids = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, wanted, None, seconds
    )
    if address is None or count is None or process is None:
        raise ValueError("no Slurm, Open MPI or Kubernetes started this process")
    if device_ids is None or (wanted is None and _is_alone_on_node()):
        return address, count, process, None  # all devices; JAX would take the first only
    return address, count, process, list(device_ids)


def _is_alone_on_node() -> bool:
    """True if Slurm or Open MPI started one process on each node."""
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # 4(x2),3: two nodes of four tasks, one of three
    return bool(re.fullmatch(r"1(\(x\d+\))?", per_node)) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def is_single() -> bool:
    """True if this process is the only one."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first() -> bool:
    """True in the process that prints and writes."""
    return is_single() or jax.process_index() == 0


def barrier() -> None:
    """Returns when all processes have called it."""
    if not is_single():
        multihost_utils.sync_global_devices("jvitmoe")


def of_first(value: bool) -> bool:
    """Returns the value of process 0, in all processes: what they see on a disk may differ."""
    return value if is_single() else bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def together(work: Callable[[], T], what: str = "") -> T:
    """Returns the result of `work` when all processes have done it. If one raises UserError, all end.

    A failed process raises its own error, the others end silently. It is a barrier too: the others see the files that
    process 0 wrote before it. `work` must not wait for other processes unless all fail alike.

    Args:
        work: done by every process.
        what: must be equal in all of them, such as the config; otherwise raises UserError.
    """
    if is_single():
        return work()
    error, result = None, None
    try:
        result = work()
    except UserError as raised:
        error = raised
    mine = np.array([zlib.crc32(str(error).encode()) or 1 if error else 0, zlib.crc32(what.encode())], np.uint32)
    errors, whats = multihost_utils.process_allgather(mine).T  # hashes, one per process
    if error is None and errors.any():
        leave("", 2)
    if error is None and (whats != whats[0]).any():
        error = UserError("processes were given different settings; start them all with the same flags")
    if error:
        error.everywhere, error.known = bool((errors == mine[0]).all()), True
        raise error
    return result  # type: ignore[return-value]


def one_first(work: Callable[[], T]) -> T:
    """As `together`, but process 0 does it before the others: for work that writes files which the others then read."""
    result = together(lambda: work() if is_first() else None)
    return together(lambda: result if is_first() else work())  # type: ignore[return-value]


def stops_at(step: int) -> bool:
    """True, in all processes, if SIGTERM to one of them ends the run with this step.

    All must ask after every step. JAX's coordinator chooses a step that none has passed.
    """
    return not is_single() and multihost_utils.reached_preemption_sync_point(step)


def guard(main: Callable[[], Any]) -> None:
    """Runs `main`. With several processes, one that fails tells the others and ends, so that none waits for it.

    Without this, a failed process would wait for the others to shut down, and they for its part of a sum. A process
    whose collective fails because another is lost ends when it can name that one.
    """
    try:
        main()
        barrier()  # a process that ends long before process 0 has written would count as lost
        _stop_heartbeat()
    except BaseException as error:
        if is_single():
            raise
        code: Any = error.code if isinstance(error, SystemExit) else 2 if isinstance(error, UserError) else 1
        if code in (0, None) or (isinstance(error, SystemExit) and code > 128):  # all stop together: a clean end
            _stop_heartbeat()
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            sys.stderr.write(f"{one_line(error)}\n")
            sys.stderr.flush()
            for heartbeat in _heartbeats:
                heartbeat.announce_unless_lost(one_line(error))
        elif not (isinstance(error, UserError) and error.known):
            for heartbeat in _heartbeats:
                heartbeat.announce_failure(one_line(error))
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, UserError):
            silent = error.everywhere and not is_first()
            leave("" if silent else f"error: {error}\n" if is_first() else f"error: {error} ({who})\n", code)
        text = "" if isinstance(error, SystemExit) else traceback.format_exc()
        leave(f"{text}{who} ends, and the others with it\n", code)


def _stop_heartbeat() -> None:
    for heartbeat in _heartbeats:
        heartbeat.stop()
