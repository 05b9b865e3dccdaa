"""One writer per run folder: a lock that the system releases when its process ends, however it ends."""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO

from jvitmoe.errors import UserError
from jvitmoe.runs import files

NAME = "lock"


class Lock:
    """The lock of a run folder, which must exist; held until the context manager or the process ends.

    The file `lock` names the process that holds it. The file stays, because only the system's lock on it counts: the
    file of a dead process blocks nothing.

    Raises UserError where another process holds the lock, with its pid and host, and where the file cannot be written.
    """

    def __init__(self, workdir: Path) -> None:
        path = workdir / NAME
        try:
            self._file: IO[str] = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
        except OSError as error:
            raise UserError(f"{path} cannot be opened: {error.strerror}; let the run folder be written") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(self._file)
            self._file.close()
            raise UserError(
                f"workdir {str(workdir)!r} is being written by {holder}; wait for it, stop it, or set --workdir"
            ) from error
        except OSError:  # some network disks have no locks; the name in the file still helps a person
            pass
        try:
            with files.writing(path):
                self._file.seek(0)
                self._file.truncate()
                json.dump({"pid": os.getpid(), "host": socket.gethostname()}, self._file)
                self._file.flush()
        except UserError:
            with contextlib.suppress(OSError):  # closing tries to write it again
                self._file.close()
            raise

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _holder(file: IO[str]) -> str:
    try:
        holder = json.loads(file.read(1000))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]!r}"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "a process that has not written its name yet"
