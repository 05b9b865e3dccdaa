"""Ends a run that hangs and shows where, so that a scheduler can start it again."""

import faulthandler
import os
import sys
import threading
import time

CODE = 70  # of sysexits.h: an internal error
LOOKS = 20  # checks within the time allowed
LONGEST = 60.0  # seconds between two checks
BACKSTOP, LEAST_BACKSTOP = 3, 5.0  # times the time allowed; seconds


class Watchdog:
    """Ends the process with all Python stacks if `progress` is not called for `minutes`; a context manager.

    A Python thread counts the time and ends the process with code 70 and one line. Time during which the process was
    stopped (SIGSTOP, a laptop asleep) does not count. This thread cannot run while C code hangs and holds the GIL. Then
    a thread of `faulthandler`, which needs no lock, shows the stacks and ends the process with code 1 after three times
    as long. It does count stopped time, so a process that was stopped for longer than that also ends.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._done = "the start"
        self._idle = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stream = sys.__stderr__ or sys.stderr

    def __enter__(self) -> "Watchdog":
        self._arm()  # not in the thread: C code may take the GIL before it first runs
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def progress(self, done: str) -> None:
        """Restarts the time. `done` names what has just been done, such as "step 7"."""
        self._done, self._idle = done, 0.0

    def _arm(self) -> None:
        backstop = min(max(BACKSTOP * self._seconds, LEAST_BACKSTOP), threading.TIMEOUT_MAX)
        faulthandler.dump_traceback_later(backstop, exit=True, file=self._stream)

    def _watch(self) -> None:
        interval = min(self._seconds / LOOKS, LONGEST)
        before = time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            self._idle += min(now - before, 2 * interval)  # if longer, this process itself was stopped
            before = now
            if self._idle > self._seconds:
                faulthandler.dump_traceback(self._stream, all_threads=True)
                since = f"no progress for {self._seconds / 60:g} minutes since {self._done}"
                remedy = "the stacks above say where it hangs; the same command goes on from the last checkpoint"
                self._stream.write(f"error: {since}; {remedy}\n")
                self._stream.flush()
                os._exit(CODE)
            self._arm()
        faulthandler.cancel_dump_traceback_later()
