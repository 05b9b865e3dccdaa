"""Detects the loss of a process: if one is killed, hangs or fails, the others name it and end.

JAX's own heartbeats also end them, but later, with a C++ stack trace and often without a name. Beats go through the
key-value store of JAX's coordinator, which runs in process 0.
"""

import contextlib
import ctypes
import itertools
import math
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from jvitmoe.errors import one_line

BEAT = 2.0  # seconds between two beats
SILENT = 15.0  # seconds without a beat after which a process counts as lost
PROPAGATION_SECONDS = 2 * BEAT  # seconds until the others have read an announcement
DETECTION_SECONDS = SILENT + PROPAGATION_SECONDS + 2 * BEAT  # from the loss of a process until all others have ended
CODE = 1
ALIVE, LOST = "jvitmoe/alive/", "jvitmoe/lost/"
LEFT = "left"  # the last beat of a process that ended normally


class Heartbeat:
    """Sends the beats of this process. Process 0 watches the beats of all others, and the others watch process 0.

    Time during which this process was stopped does not count.

    Args:
        client, address: of JAX's coordinator, HOST:PORT.
        process, count: index of this process, and number of all.
    """

    def __init__(self, client: Any, address: str, process: int, count: int) -> None:
        self._client, self._address, self._process, self._count = client, address, process, count
        self._last: dict[int, str] = {}  # process -> its last beat
        self._silent = dict.fromkeys(range(1, count) if process == 0 else [0], 0.0)  # process -> seconds since then
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()
        self._announce_aborts()

    def stop(self) -> None:
        """Ends the watch: from now on processes may end in any order."""
        self._over.set()
        ctypes.CDLL(None).signal(signal.SIGABRT, signal.SIG_DFL)
        for thread in self._threads:
            thread.join(BEAT)  # none of them may call a coordinator that shuts down
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{ALIVE}{self._process}", LEFT, allow_overwrite=True)

    def announce_failure(self, why: str) -> None:
        """Announces that this process is about to end. Returns after the others have had time to read it."""
        self._announce(self._process, why)
        self._wait_for_readers()

    def announce_unless_lost(self, why: str) -> None:
        """Waits until every other process has sent a new beat, then calls `announce_failure`. If one is lost, this
        process ends and names that one instead. For an error whose cause may be the loss of another process.
        """
        self._probe()
        time.sleep(BEAT)  # a beat from before the error may still arrive
        before = self._beats()
        for _ in range(math.ceil(DETECTION_SECONDS / BEAT)):
            time.sleep(BEAT)
            now = self._beats()
            if before and all(beat == LEFT or now.get(key, beat) != beat for key, beat in before.items()):
                break
        self.announce_failure(why)

    def _announce_aborts(self) -> None:
        """Lets a process that aborts call `announce_unless_lost`. Threads of JAX and Gloo abort, without a name, if
        another process is lost or if a message does not fit after the loss of a third.
        """

        def handle(_: int) -> None:
            signal.alarm(
                int(DETECTION_SECONDS + 3 * PROPAGATION_SECONDS)
            )  # ends the process if the aborted thread holds a needed lock
            thread = threading.Thread(target=self.announce_unless_lost, args=("it aborted",), daemon=True)
            thread.start()  # a new thread, because this one was interrupted at an arbitrary point
            thread.join()

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)  # a reference for C code
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)  # Python would run its handler in the main thread only

    def _beats(self) -> dict[str, str]:
        """Returns key -> last beat; nothing if the coordinator does not answer, which `_beat` notices too."""
        with contextlib.suppress(Exception):
            return dict(self._client.key_value_dir_get(ALIVE))
        return {}

    def _beat(self) -> None:
        for number in itertools.count(1):
            try:
                self._client.key_value_set(f"{ALIVE}{self._process}", str(number), allow_overwrite=True)
                lost = self._client.key_value_dir_get(LOST)
                beats = self._client.key_value_dir_get(ALIVE) if self._process == 0 else [(ALIVE + "0", str(number))]
            except Exception as error:  # JAX raises several kinds for a broken connection
                if not self._over.is_set():
                    self._end(_lost(0, self._count, one_line(error)[:120]))
                return
            if lost and not self._over.is_set():
                self._end(lost[0][1])
            for key, beat in beats:
                process = int(key.rpartition("/")[2])
                if process in self._silent and self._last.get(process) != beat:
                    self._last[process], self._silent[process] = beat, 0.0
            if self._over.wait(BEAT):
                return

    def _probe(self) -> None:
        """Ends this process if process 0 is gone. JAX would end it soon, without saying why."""
        host, _, port = self._address.rpartition(":")
        try:
            if self._process:
                socket.create_connection((host.strip("[]"), int(port)), timeout=BEAT).close()
        except ConnectionRefusedError:
            self._end(_lost(0, self._count, "no answer at the coordinator's address"))
        except OSError:  # it or the network hangs: SILENT decides
            pass

    def _watch(self) -> None:
        interval, before = BEAT / 2, time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            passed, before = min(now - before, 2 * interval), now  # if longer, this process itself was stopped
            for process in self._silent:
                self._silent[process] += 0 if self._last.get(process) == LEFT else passed
                if self._silent[process] > 2 * BEAT:
                    self._probe()
                if self._silent[process] > SILENT:
                    why = f"no sign of life for {SILENT:g} s"
                    if self._process == 0:
                        self._announce(process, why)
                    self._end(_lost(process, self._count, why))

    def _announce(self, process: int, why: str) -> None:
        self._over.set()  # this process does not act on announcements any more
        with contextlib.suppress(Exception):  # the first announcement stays
            self._client.key_value_set(f"{LOST}0", _lost(process, self._count, why))

    def _wait_for_readers(self) -> None:
        if self._process == 0:  # the store ends with this process
            time.sleep(PROPAGATION_SECONDS)

    def _end(self, text: str) -> None:
        self._over.set()
        self._wait_for_readers()
        ends = f"process {self._process} ends too; start all again to go on from the last checkpoint"
        leave(f"error: {text}; {ends}\n", CODE)


def leave(text: str, code: int) -> None:
    """Ends this process at once with a text on standard error, even while other threads wait."""
    with contextlib.suppress(Exception):  # a terminal or disk that cannot be written must not keep the process
        stream = sys.__stderr__ or sys.stderr  # the progress line replaces sys.stderr by one that needs its lock
        stream.write(f"\n{text}" if text and stream.isatty() else text)  # the cursor stands behind the progress line
        stream.flush()
    os._exit(code)


def _lost(process: int, count: int, why: str) -> str:
    return f"process {process} of {count} is lost ({why})"
