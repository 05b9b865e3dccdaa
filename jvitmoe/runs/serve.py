"""Serves one page to browsers of this machine, and makes it anew when its files have changed."""

import contextlib
import http.server
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from jvitmoe.errors import UserError
from jvitmoe.runs import files
from jvitmoe.runs.console import console

HOST = "127.0.0.1"
WATCHED = (files.CONFIG, files.METRICS, files.RESULT, files.SAMPLES)


def serve(make: Callable[[str], str], folders: Sequence[Path], port: int) -> None:
    """Serves what `make` returns until an interrupt. Raises UserError as `make` does, or if the port is taken.

    Args:
        make: returns the page for a `stamp` of the folders. The page asks for /stamp, and loads itself again when the
            stamp has changed.
        folders: the run folders.
        port: to listen at; 0 is any that is free.
    """
    kept, making = [now := stamp(folders), make(now)], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            now = stamp(folders)
            # A name of another site may lead to this machine; only a page opened from here is answered.
            if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
                self._answer(403, "text/plain", "open it as 127.0.0.1")
            elif self.path == "/stamp":
                self._answer(200, "text/plain", now)
            elif self.path == "/":
                try:
                    with making:
                        if kept[0] != now:
                            kept[:] = now, make(now)
                        page = kept[1]
                    self._answer(200, "text/html", page)
                except UserError as error:  # such as a file that is being written
                    self._answer(503, "text/plain", str(error))
            else:
                self._answer(404, "text/plain", "there is only /")

        def _answer(self, code: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            if code == 503:
                self.send_header("Refresh", "2")  # seconds; this answer has no script that asks again
            with contextlib.suppress(ConnectionError):  # the browser has left
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    try:
        server = http.server.ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--port is {port}; it cannot be listened at ({error}); choose another, or 0 for any"
        ) from error
    with server:
        console.print(f"page        http://{HOST}:{server.server_port} until Ctrl-C")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("ended")


def stamp(folders: Sequence[Path]) -> str:
    """Returns a text that changes when a file of a run folder does."""
    found = []
    for path in (folder / name for folder in folders for name in WATCHED):
        try:
            status = path.stat()
            found.append(f"{status.st_mtime_ns}.{status.st_size}")
        except OSError:
            found.append("-")
    return " ".join(found)
