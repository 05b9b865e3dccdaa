"""A run that hangs says where and ends, so that whatever started it can start it again."""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

CODE = 70  # of sysexits.h: an internal error
LOOKS = 20  # how often within the time allowed
LONGEST = 60.0  # seconds between two looks
BACKSTOP, LEAST_BACKSTOP = 3, 5.0  # times the time allowed; seconds


class Watchdog:
    """Ends the process with all Python stacks if `progress` is not called for so many minutes; a context manager.

    A Python thread counts the time and ends the process with code 70 and one line. Time in which the process was
    stopped (SIGSTOP, a laptop asleep) does not count. That thread cannot run while C code hangs with Python's lock
    (GIL): then a thread of `faulthandler`, which needs no lock, shows the stacks and ends the process with code 1 after
    three times as long. It does count stopped time, so a process that was stopped for longer than that also ends.

    Args:
        minutes: how long; 0 never ends anything.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._done = "the start"
        self._idle = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stream = sys.__stderr__ or sys.stderr

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def progress(self, done: str) -> None:
        """Says what has just been done, such as "step 7"."""
        self._done, self._idle = done, 0.0

    def _watch(self) -> None:
        look = min(self._seconds / LOOKS, LONGEST)
        backstop = min(max(BACKSTOP * self._seconds, LEAST_BACKSTOP), threading.TIMEOUT_MAX)
        before = time.monotonic()
        while True:
            faulthandler.dump_traceback_later(backstop, exit=True, file=self._stream)
            if self._over.wait(look):
                break
            now = time.monotonic()
            self._idle += min(now - before, 2 * look)  # more than that, and it is this process that stood still
            before = now
            if self._idle > self._seconds:
                self._end()
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        faulthandler.dump_traceback(self._stream, all_threads=True)
        minutes = f"{self._seconds / 60:g}"
        self._stream.write(
            f"error: no progress for {minutes} minutes since {self._done} (config.train.stall_minutes); "
            "the stacks above say where it hangs; the same command goes on from the last checkpoint\n"
        )
        self._stream.flush()
        os._exit(CODE)
