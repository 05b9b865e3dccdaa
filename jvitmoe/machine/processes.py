"""Several processes as one run, through `jax.distributed`: joining, agreeing, and ending together.

Every process runs the same program on the same batches. Only process 0 prints, and writes files; the arrays of a
checkpoint are written by all. If one is lost, JAX ends the others; a launcher starts all of them again, and the run
goes on from its last checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jvitmoe.errors import UserError, first_few, one_line
from jvitmoe.machine import devices

T = TypeVar("T")
LOST_SECONDS = 20  # without a heartbeat of a process, until JAX notices; it ends all others as long after that at most
ANSWER_SECONDS = 2  # for a connection to process 0
SHUTDOWN_SECONDS = 15  # for which a process that has ended waits for the others


class Join(NamedTuple):
    """How a process joins the others: the flags of `jvitmoe train`."""

    distributed: bool = False
    coordinator: str = ""
    processes: int = 1
    process: int = 0
    join_seconds: int = 20


def join(values: Join) -> None:
    """Joins the other processes if there are any. Raises UserError."""
    address, given = values.coordinator, f"--processes={values.processes} --process={values.process}"
    if not address and not values.distributed:
        if (values.processes, values.process) != (1, 0):
            raise UserError(f"{given} needs --coordinator=HOST:PORT")
        return
    where: dict[str, Any] = {"local_device_ids": []} if _is_alone_on_node() else {}
    if address:
        where = {"coordinator_address": address, "num_processes": values.processes, "process_id": values.process}
        where["cluster_detection_method"] = "deactivate"
    cannot = f"cannot join by {f'--coordinator={address} {given}' if address else '--distributed'}"
    joined = threading.Event()

    def give_up() -> None:
        if joined.wait(values.join_seconds):
            return
        found = address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        why = (found and _unreachable(found)) or "not all processes have reached process 0"
        if not joined.is_set():
            leave(f"error: {cannot}: after {values.join_seconds} s (--join_seconds) {why}\n", 2)

    threading.Thread(target=give_up, name="joining", daemon=True).start()  # JAX itself would abort
    try:
        if address and values.process == 0:  # JAX crashes if the port is taken
            bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address)
            socket.create_server(("", int(bound.rpartition(":")[2]))).close()
        jax.distributed.initialize(
            **where,
            initialization_timeout=2 * abs(values.join_seconds) + 60,  # `give_up` ends it earlier
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except Exception as error:  # JAX and the ways to find a cluster raise many kinds
        remedy = "give a free port, a number for each process, or start it in a job of Slurm, Open MPI or Kubernetes"
        raise UserError(f"{cannot}: {one_line(error)}; {remedy}") from error
    finally:
        joined.set()
    devices.start()
    if not is_single():
        text = f"if another process is lost, JAX ends this one within {2 * LOST_SECONDS} s; start all again to go on"
        sys.stderr.write(f"note: {_name(jax.process_index())}: {text}\n")


def _unreachable(address: str) -> str:
    """Returns why nothing answers at the address of process 0; "" if something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except Exception as error:  # also for a port that is none
        remedy = "give the name or address of its node, as all nodes know it, and start all"
        return f"process 0 does not answer at {address}: {one_line(error)}; {remedy}"
    return ""


def _is_alone_on_node() -> bool:
    """True if Slurm or Open MPI started one process per node. It uses all GPUs; JAX would take only the first."""
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # 4(x2),3: two nodes of four tasks, one of three
    alone = re.fullmatch(r"1(\(x\d+\))?", per_node) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return bool(alone) and "JAX_LOCAL_DEVICE_IDS" not in os.environ


def _name(process: int) -> str:
    return f"process {process} of {jax.process_count()}"


def is_single() -> bool:
    """True if this process is the only one, or has left the others."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first() -> bool:
    """True in the process that prints and writes."""
    return is_single() or jax.process_index() == 0


def barrier() -> None:
    """Returns when all processes have called it."""
    if not is_single():
        multihost_utils.sync_global_devices("jvitmoe")


def broadcast_from_first(value: bool) -> bool:
    """Returns the value of process 0, in all processes: what they see on a disk may differ."""
    return value if is_single() else bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def together(work: Callable[[], T]) -> T:
    """Returns the result of `work` when all processes have done it. If it raises UserError in one, all raise. It is a
    barrier too: the others see the files that process 0 wrote before it. `work` must not wait for other processes
    unless all fail alike."""
    if is_single():
        return work()
    error, result = None, None
    try:
        result = work()
    except UserError as raised:
        error = raised
    if (failed := np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))).size:
        all_raise(error or UserError(f"{_name(failed[0])} has failed; its own line says why"))
    return result  # type: ignore[return-value]


def all_raise(error: UserError) -> NoReturn:
    """Raises an error that all processes have found, in all of them."""
    if not is_single():
        jax.distributed.shutdown()  # waits for the others; from here on each is on its own
    raise error


def first_process_then_others(work: Callable[[], T]) -> T:
    """As `together`, but process 0 does it before the others: for work that writes files which the others then read."""
    result = together(lambda: work() if is_first() else None)
    return together(lambda: result if is_first() else work())  # type: ignore[return-value]


def agree(facts: Mapping[str, object], remedy: str = "start all alike") -> None:
    """Raises UserError, in all processes, if a fact of one, such as a setting, is not that of process 0."""
    mine = {name: str(value) for name, value in facts.items()}
    text_N = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(text_N.size)))
    first = json.loads(multihost_utils.broadcast_one_to_all(np.resize(text_N, size)).tobytes())

    def compare() -> None:
        differ = [name for name in mine | first if mine.get(name) != first.get(name)]
        if differ:
            shown = first_few([f"{name} is {mine.get(name)} and not {first.get(name)}" for name in differ])
            raise UserError(f"{_name(jax.process_index())} differs from process 0: {shown}; {remedy}")

    together(compare)


def source_hash() -> str:
    """Returns a hash of the source files of this package."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def guard(main: Callable[[], Any]) -> None:
    """Runs `main`. One of several processes that fails by itself ends at once; the others end as after any loss.
    Python's own exit would wait for the others, which may wait for this one."""
    try:
        main()
        barrier()  # a process that ends long before process 0 has written would count as lost
    except BaseException as error:
        if is_single() or isinstance(error, SystemExit):  # after a signal all end together
            raise
        expected = isinstance(error, UserError)
        text = f"error: {error}" if expected else f"{traceback.format_exc()}error: {one_line(error)}"
        remedy = "if another process ended before, its output says why; start all again to go on"
        leave(f"{text} ({_name(jax.process_index())} ends, and so do all; {remedy})\n", 2 if expected else 1)


def leave_last(code: int) -> NoReturn:
    """Ends this process at once after its run, so that nothing waits at exit, without being lost to the others."""
    sys.stdout.flush()
    if not is_single():
        jax.distributed.shutdown()
    leave("", code)


def leave(text: str, code: int) -> NoReturn:
    """Ends this process at once with a text on standard error, even while other threads wait."""
    with contextlib.suppress(Exception):  # a terminal or disk that cannot be written must not keep the process
        stream = sys.__stderr__ or sys.stderr  # the progress line replaces sys.stderr by one that needs its lock
        stream.write(f"\n{text}" if text and stream.isatty() else text)  # the cursor stands behind the progress line
        stream.flush()
    os._exit(code)
