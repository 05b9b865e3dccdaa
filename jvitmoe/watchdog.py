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


class Watchdog:
    """Ends the process with all Python stacks where nobody has called `progress` for so many minutes; a context
    manager. Time in which the process itself was stopped (SIGSTOP, a laptop asleep) does not count.

    Args:
        minutes: how long; 0 never ends anything.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._done = "the start"
        self._idle = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()

    def progress(self, done: str) -> None:
        """Says what has just been done, such as "step 7"."""
        self._done, self._idle = done, 0.0

    def _watch(self) -> None:
        look = min(self._seconds / LOOKS, LONGEST)
        before = time.monotonic()
        while not self._over.wait(look):
            now = time.monotonic()
            self._idle += min(now - before, 2 * look)  # more than that, and it is this process that stood still
            before = now
            if self._idle > self._seconds:
                self._end()

    def _end(self) -> None:
        sys.stdout.flush()
        stream = sys.__stderr__ or sys.stderr
        faulthandler.dump_traceback(stream, all_threads=True)
        minutes = f"{self._seconds / 60:g}"
        stream.write(
            f"error: no progress for {minutes} minutes since {self._done} (config.train.stall_minutes); "
            "the stacks above say where it hangs; the same command goes on from the last checkpoint\n"
        )
        stream.flush()
        os._exit(CODE)
