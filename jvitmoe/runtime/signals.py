"""SIGTERM, SIGINT and SIGHUP: the first lets the step end and the state be saved, the second ends the process at
once."""

import ctypes
import os
import signal
import threading
from typing import Any

from jvitmoe.runtime import heartbeat, processes

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """Records whether a signal has asked the run to stop; a context manager for the main thread.

    A thread of its own reads signals, because Python's handlers wait while the main thread compiles. A signal ends the
    process at once if it is the second one or if there is nothing to save.

    With several processes, a signal to one stops all after the same step: JAX's own handler of SIGTERM tells the
    coordinator, which chooses a step that no process has reached.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.unsaved = False  # True if no checkpoint holds the last steps; set by the loop
        self._jax_handler = None if processes.is_single() else _handler_in_c(signal.SIGTERM)

    def __enter__(self) -> "Stop":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()  # by nohup
        self._handlers_before = {number: signal.signal(number, lambda *_: None) for number in {*STOPS} - ignored}
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def asked(self, step: int) -> int | None:
        """Returns the signal that makes this step the last, or None. All processes must call it after every step."""
        if processes.is_single():
            return self.signal
        return signal.SIGTERM if processes.stops_at(step) else None

    def _listen(self) -> None:
        while numbers := os.read(self._read, 1):
            number = numbers[0]
            # A terminal that closes may send two SIGHUPs, its shell's and the kernel's.
            if number not in STOPS or (number == signal.SIGHUP and self.signal is not None):
                continue
            if self.signal is not None or (processes.is_single() and not self.unsaved):
                saved = "without saving the last steps" if self.unsaved else "with no step to save"
                name = signal.Signals(number).name
                heartbeat.leave(f"stopped at once by {name}, {saved}; the same command goes on\n", 128 + number)
            self.signal = number
            self._tell_others()

    def _tell_others(self) -> None:
        """Makes the other processes stop too, if there are any."""
        if self._jax_handler:
            self._jax_handler(signal.SIGTERM)


def _handler_in_c(number: int) -> Any:
    """Returns the handler that C code has set for a signal, or None. Python's `signal` cannot see it."""
    default, ignore, failed = 0, 1, ctypes.c_void_p(-1).value
    swap = ctypes.CDLL(None).signal
    swap.restype, swap.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    address = swap(number, default) or default
    if address != failed:
        swap(number, address)
    return None if address in (default, ignore, failed) else ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
