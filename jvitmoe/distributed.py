"""Several processes as one run, through JAX's own runtime: joining, and leaving without hanging anybody.

Every process runs the same program on the same batch addresses; process 0 alone prints and writes files.
"""

import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags
from jax._src import distributed as internals  # the coordinator's key-value store has no public name
from jax.experimental import multihost_utils

from jvitmoe.config import UserError, one_line
from jvitmoe.lifeline import VERDICT, Lifeline, leave

T = TypeVar("T")

_lifelines: list[Lifeline] = []  # one, once several processes have joined

# Without a heartbeat, until JAX ends all. One comes every half of this, so half may have passed when a process is lost;
# the rest must be longer than `lifeline` takes, because JAX does not say whom it lost.
HEARTBEAT_SECONDS = int(2 * VERDICT + 8)
SHUTDOWN_SECONDS = 15


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags that join several processes into one run."""
    flags.DEFINE_bool("distributed", False, "Join what Slurm, Open MPI or Kubernetes started.", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, to join processes by hand.", flag_values=values)
    flags.DEFINE_integer("processes", 1, "Number of processes, with --coordinator.", flag_values=values)
    flags.DEFINE_integer("process", 0, "Number of this one, from 0, with --coordinator.", flag_values=values)
    flags.DEFINE_integer("join_seconds", 20, "How long to wait for the other processes.", flag_values=values)


def join(values: flags.FlagValues) -> None:
    """Joins the other processes as the flags say; nothing where they say nothing. Raises UserError.

    Ends the process with one line and exit code 2 where the others are not all there in time: JAX itself would abort.
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
    who = f"process {values.process} of {values.processes}" if by_hand else "this process"
    late = (
        f"error: {who} waited {values.join_seconds} s for the others at {where}, and they are not all there; "
        "check the address and that as many processes were started as --processes says\n"
    )
    timer = threading.Timer(values.join_seconds, leave, (late, 2))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator_address=values.coordinator if by_hand else None,
            num_processes=values.processes if by_hand else None,
            process_id=values.process if by_hand else None,
            cluster_detection_method="deactivate" if by_hand else None,
            initialization_timeout=10 * values.join_seconds,  # the timer comes first: on time-out JAX aborts
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        count = jax.process_count()  # by the devices of all: waits for ever where they were told different numbers
        if count > 1:
            coordinator = internals.global_state
            address = coordinator.coordinator_address or ""
            _lifelines.append(Lifeline(coordinator.client, address, jax.process_index(), count))
    except (ValueError, RuntimeError) as error:
        found = " ".join(str(error).split())[:200]
        raise UserError(f"{who} cannot join at {where}: {found}; check --coordinator, or start it in a job") from error
    finally:
        timer.cancel()


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
            for lifeline in _lifelines:
                lifeline.tell_unless_lost(one_line(error))
        elif not (isinstance(error, UserError) and error.known):
            for lifeline in _lifelines:
                lifeline.tell(one_line(error))
        who = "" if first() else f" (process {jax.process_index()} of {jax.process_count()})"
        if isinstance(error, UserError):
            leave("" if error.everywhere and not first() else f"error: {error}{who}\n", code)
        text = "" if isinstance(error, SystemExit) else traceback.format_exc()
        leave(f"{text}process {jax.process_index()} of {jax.process_count()} ends, and the others with it\n", code)


def _cut() -> None:
    for lifeline in _lifelines:
        lifeline.cut()


def _check_address(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator is {address!r}; it must be HOST:PORT, such as node0:1234")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(f"--coordinator is {address!r}; its host is not known here: {error}") from error
