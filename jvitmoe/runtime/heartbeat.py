"""Who of several processes still lives: where one is killed, freezes or fails, the others say which and end.

JAX's own heartbeats end them too, but later, with a stack of C++ and often without a name. Signs of life go through the
key-value store of JAX's coordinator, which lives in process 0.
"""

import contextlib
import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

BEAT = 2.0  # seconds between two signs of life
SILENT = 15.0  # seconds without one, after which a process counts as lost
HEARD = 2 * BEAT  # seconds within which the others have read what was announced
VERDICT = SILENT + HEARD + 2 * BEAT  # seconds from the loss of a process until all others have said so and ended
CODE = 1
ALIVE, LOST = "jvitmoe/alive/", "jvitmoe/lost/"
LEFT = "left"  # the last sign of a process that ended as it should


class Heartbeat:
    """Signs of life of this process, and a watch over the others' (by process 0) or over process 0's (by the others).
    Time in which this process itself stood still does not count.

    Args:
        client, address: of JAX's coordinator; HOST:PORT.
        process, count: number of this one, and of all.
    """

    def __init__(self, client: Any, address: str, process: int, count: int) -> None:
        self._client, self._address, self._process, self._count = client, address, process, count
        self._signs: dict[int, str] = {}  # by process: the last one seen
        self._idle = dict.fromkeys(range(1, count) if process == 0 else [0], 0.0)  # seconds since then
        self._over = threading.Event()
        works = self._beat, self._watch
        self._threads = [threading.Thread(target=work, name="heartbeat", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()
        self._hold_aborts()

    def cut(self) -> None:
        """Ends the watch, because all end now and in any order."""
        self._over.set()
        ctypes.CDLL(None).signal(signal.SIGABRT, signal.SIG_DFL)
        for thread in self._threads:
            thread.join(BEAT)  # so that none of them asks a coordinator that is being shut down
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{ALIVE}{self._process}", LEFT, allow_overwrite=True)

    def tell(self, why: str) -> None:
        """Tells the others that this process is about to end; returns once they had time to hear it."""
        self._announce(self._process, why)
        self._let_hear()

    def tell_unless_lost(self, why: str) -> None:
        """As `tell`, once every other process gave another sign of life; where one does not, this process ends like all
        that lost it. For an error that may be its own, or come from the loss of another.
        """
        self._probe()
        time.sleep(BEAT)  # a sign from before the error may still be under way
        before = self._alive()
        for _ in range(math.ceil(VERDICT / BEAT)):
            time.sleep(BEAT)
            now = self._alive()
            if before and all(sign == LEFT or now.get(key, sign) != sign for key, sign in before.items()):
                break
        self.tell(why)

    def _hold_aborts(self) -> None:
        """Makes an abort tell, too. Threads of JAX and Gloo abort where a process is lost, or where what comes from a
        third one then does not fit, and do not say whom they lost.
        """

        def hold(_: int) -> None:
            signal.alarm(int(VERDICT + 3 * HEARD))  # the end, should what aborted hold a lock that others need
            telling = threading.Thread(target=self.tell_unless_lost, args=("it aborted",), daemon=True)
            telling.start()  # because this thread may be in the middle of anything
            telling.join()

        self._held = ctypes.CFUNCTYPE(None, ctypes.c_int)(hold)  # kept, because C code calls it
        ctypes.CDLL(None).signal(signal.SIGABRT, self._held)  # Python's own would come too late, in the main thread

    def _alive(self) -> dict[str, str]:
        with contextlib.suppress(
            Exception
        ):  # of a connection that broke: proves nobody alive, and `_beat` sees it, too
            return dict(self._client.key_value_dir_get(ALIVE))
        return {}

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(BEAT if number else 0):
            number += 1
            try:
                self._client.key_value_set(f"{ALIVE}{self._process}", str(number), allow_overwrite=True)
                lost = self._client.key_value_dir_get(LOST)
                alive = self._client.key_value_dir_get(ALIVE) if self._process == 0 else [(ALIVE + "0", str(number))]
            except Exception as error:  # whatever JAX makes of a connection that broke
                if not self._over.is_set():
                    self._end(_lost(0, self._count, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"))
                return
            if lost and not self._over.is_set():
                self._end(lost[0][1])
            for key, sign in alive:
                process = int(key.rpartition("/")[2])
                if process in self._idle and self._signs.get(process) != sign:
                    self._signs[process], self._idle[process] = sign, 0.0

    def _probe(self) -> None:
        """Ends this process where process 0 is gone: JAX, which is about to end it too, would not say so."""
        host, _, port = self._address.rpartition(":")
        try:
            if self._process:
                socket.create_connection((host.strip("[]"), int(port)), timeout=BEAT).close()
        except ConnectionRefusedError:
            self._end(_lost(0, self._count, "nobody answers at the coordinator's address"))
        except OSError:  # it hangs, or the network does: silence will tell
            pass

    def _watch(self) -> None:
        look, before = BEAT / 2, time.monotonic()
        while not self._over.wait(look):
            now = time.monotonic()
            passed, before = min(now - before, 2 * look), now  # more than that, and it is this process that stood still
            for process in self._idle:
                self._idle[process] += 0 if self._signs.get(process) == LEFT else passed
                if self._idle[process] > 2 * BEAT:
                    self._probe()
                if self._idle[process] > SILENT:
                    why = f"no sign of life for {SILENT:g} s"
                    if self._process == 0:
                        self._announce(process, why)
                    self._end(_lost(process, self._count, why))

    def _announce(self, process: int, why: str) -> None:
        self._over.set()  # this process need not hear it
        with contextlib.suppress(Exception):  # the first one stays
            self._client.key_value_set(f"{LOST}0", _lost(process, self._count, why))

    def _let_hear(self) -> None:
        if self._process == 0:  # the store ends with this process
            time.sleep(HEARD)

    def _end(self, text: str) -> None:
        self._over.set()
        self._let_hear()
        leave(
            f"error: {text}; process {self._process} ends too; start all again to go on from the last checkpoint\n",
            CODE,
        )


def leave(text: str, code: int) -> None:
    """Ends this process at once, whatever its other threads wait for, with a text on standard error."""
    with contextlib.suppress(Exception):  # a terminal or disk that takes no text must not keep the process
        stream = sys.__stderr__ or sys.stderr  # not what the progress line puts in its place, which takes its lock
        stream.write(f"\n{text}" if text and stream.isatty() else text)  # the cursor stands behind the progress line
        stream.flush()
    os._exit(code)


def _lost(process: int, count: int, why: str) -> str:
    return f"process {process} of {count} is lost ({why})"
