"""SIGTERM, SIGINT and SIGHUP: the first lets the step end and the state be saved, the second ends the process at
once."""

import itertools
import os
import signal
import threading
from collections.abc import Callable

from jax.experimental import multihost_utils

from jvitmoe.machine import processes

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_calls = itertools.count(1)  # of `Stop.asked` with several processes, in all runs of this process


class Stop:
    """Records whether a signal has asked the run to stop; a context manager for the main thread.

    A thread of its own reads signals, because Python's handlers wait while the main thread compiles. A signal ends the
    process at once if it is the second one or if there is nothing to save.

    With several processes, a signal to one stops all after the same step. JAX's own handler of SIGTERM tells its
    coordinator, which chooses a step that no process has reached; Python's would replace it, so it comes after that
    step. The other signals become a SIGTERM.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.unsaved = False  # True if no checkpoint holds the last steps; set by the loop
        self.announce: Callable[[], None] = lambda: None  # says what the first signal has begun; set by the loop
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Stop":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        left = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()  # by nohup
        if not processes.is_single():
            left.add(signal.SIGTERM)
        self._handlers_before = {number: signal.signal(number, lambda *_: None) for number in {*STOPS} - left}
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        os.close(self._write)
        if self._thread:
            self._thread.join()
        os.close(self._read)

    def asked(self) -> int | None:
        """Returns the signal that makes this step the last, or None. All processes must call it after every step."""
        if processes.is_single():
            return self.signal
        # Not the step of the run: after a signal before the first call JAX chooses 1, which a resumed run is past.
        if not multihost_utils.reached_preemption_sync_point(next(_calls)):
            return None
        self.signal = signal.SIGTERM
        if self._thread:  # from here on it reads SIGTERM too, so that one more ends the process at once
            signal.signal(signal.SIGTERM, lambda *_: None)
        return self.signal

    def _listen(self) -> None:
        while numbers := os.read(self._read, 1):
            number = numbers[0]
            # A terminal that closes may send two SIGHUPs, its shell's and the kernel's.
            if number not in STOPS or (number == signal.SIGHUP and self.signal is not None):
                continue
            if self.signal is not None or (processes.is_single() and not self.unsaved):
                saved = "without saving the last steps" if self.unsaved else "with no step to save"
                name = signal.Signals(number).name
                processes.leave(f"stopped at once by {name}, {saved}; the same command goes on\n", 128 + number)
            self.signal = number
            self._tell_others()

    def _tell_others(self) -> None:
        """Says that the run stops, and makes the other processes stop too, if there are any."""
        # In a thread: while it waits for an output that nobody reads, a second signal must still end the process.
        threading.Thread(target=self.announce, name="stopping", daemon=True).start()
        if not processes.is_single():
            os.kill(os.getpid(), signal.SIGTERM)
