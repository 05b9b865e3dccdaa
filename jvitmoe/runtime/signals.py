"""Being asked to stop: SIGTERM and SIGINT let the step end and the state be saved; a second one ends at once."""

import ctypes
import os
import signal
import threading
from typing import Any

from jvitmoe.runtime import heartbeat, processes

ASKS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether a signal has asked the run to end; a context manager, entered by the main thread.

    Signals are read by a thread of their own, because Python's handlers wait while the main thread compiles. One that
    comes while there is nothing to save ends the process at once, and so does any second one.

    Of several processes any one may be asked, and all are told so after the same step: JAX's own handler of SIGTERM
    tells the coordinator, which names a step that none has passed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.unsaved = False  # whether steps were done that no checkpoint holds: set by the loop
        self._tell_all = None if processes.alone() else _handler_in_c(signal.SIGTERM)

    def __enter__(self) -> "Stop":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in ASKS}
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def asked(self, step: int) -> int | None:
        """Returns the signal that makes this step the last, or None. Called after every step, in all processes."""
        if processes.alone():
            return self.signal
        return signal.SIGTERM if processes.stops_at(step) else None

    def _listen(self) -> None:
        while numbers := os.read(self._read, 1):
            if numbers[0] in ASKS:
                self._ask(numbers[0])

    def _ask(self, number: int) -> None:
        if self.signal is not None or (processes.alone() and not self.unsaved):
            saved = "without saving the last steps" if self.unsaved else "with no step to save"
            heartbeat.leave(
                f"stopped at once by {signal.Signals(number).name}, {saved}; the same command goes on\n", 128 + number
            )
        self.signal = number
        if self._tell_all:
            self._tell_all(signal.SIGTERM)


def _handler_in_c(number: int) -> Any:
    """Returns the handler that C code has set for a signal, or None: Python's `signal` can neither see nor keep it."""
    default, ignore, failed = 0, 1, ctypes.c_void_p(-1).value
    swap = ctypes.CDLL(None).signal
    swap.restype, swap.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    address = swap(number, default) or default
    return None if address in (default, ignore, failed) else ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
