"""Serves a model to this machine: `jvitmoe serve --model cifar10_cct`, a page to drop pictures into, and JSON.

A picture that is sent to http://127.0.0.1:8000 by POST is answered with its most probable classes. No picture is kept,
and no other machine can ask: put a web server with its own rules in front, if others shall.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from absl import flags

from jvitmoe.commands import cli
from jvitmoe.errors import UserError, one_line, printable
from jvitmoe.runs.console import console, warnings_as_lines

HOST, LARGEST, SECONDS = "127.0.0.1", 32 * 2**20, 30  # bytes of a picture, and the longest wait for some of it
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 36rem; margin: 1rem auto; padding: 0 1rem }
label { display: block; padding: 1.5rem 1rem; border: 2px dashed #888; border-radius: 8px; text-align: center }
label.over, label:focus-within { border-color: #0072b2; background: #0072b211 }
img { max-width: 100%; max-height: 16rem; display: block; margin: 1rem 0 } img:not([src]) { display: none }
meter { width: 12rem; vertical-align: middle } td { padding: 0 1rem 0 0 }
"""
SCRIPT = """
const ids = ["drop", "choose", "seen", "said", "table"];
const [drop, choose, seen, said, table] = ids.map(id => document.getElementById(id));
async function classify(file) {
  if (!file) return;
  table.replaceChildren();
  said.textContent = "reading the picture";
  seen.src = URL.createObjectURL(file);
  seen.alt = file.name;
  try {
    const answer = await fetch("/", { method: "POST", body: file });
    const found = await answer.json();
    said.textContent = answer.ok ? "" : found.error;
    for (const guess of answer.ok ? found : []) {
      const row = table.insertRow(), meter = document.createElement("meter");
      meter.value = guess.probability;
      row.insertCell().textContent = guess.name;
      row.insertCell().append(meter);
      row.insertCell().textContent = (100 * guess.probability).toFixed(1) + " %";
    }
  } catch (error) {
    said.textContent = "the server does not answer; is it still running?";
  }
}
choose.onchange = () => classify(choose.files[0]);
for (const kind of ["dragover", "dragleave", "drop"])
  addEventListener(kind, event => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") classify(event.dataTransfer.files[0]);
  });
"""
PAGE = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>jvitmoe</title>
<style>{STYLE}</style>
<h1>What is it?</h1>
<label id="drop">Drop a picture here, or <input id="choose" type="file" accept="image/*"></label>
<p id="said" role="status"></p><table id="table"></table><img id="seen" alt="">
<script>{SCRIPT}</script></html>
"""


def main(argv: list[str]) -> None:
    """Runs the command until it is interrupted. Raises UserError."""
    values = cli.parse(argv, _define_flags)
    if not values.workdir:
        raise UserError("--model is missing; give a run folder, an exported one, or --model=cifar10_cct")
    cli.end_cleanly()
    # Not above: these import JAX, and --help need not wait for that.
    from jvitmoe.interop import classifier
    from jvitmoe.machine import compilation

    compilation.use_cache()
    with warnings_as_lines():
        model = classifier.load(values.workdir, values.checkpoint, values.ema)
    with make_server(functools.partial(model, top=values.top), values.port) as server:
        console.print(f"serving     {printable(values.workdir)} at http://{HOST}:{server.server_port}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("stopped")


def make_server(classify: Callable[[list[bytes]], list[list[Any]]], port: int) -> ThreadingHTTPServer:
    """Returns a server on this machine's own address that answers with what `classify` says of a picture. Raises
    UserError where the port is in use."""
    try:
        server = ThreadingHTTPServer((HOST, port), functools.partial(_Handler, classify, threading.Lock()))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port is {port}, which cannot be used ({one_line(error)}); give another") from error
    server.daemon_threads = True
    return server


def _allowed(text: str) -> str:
    """Returns the source of Content-Security-Policy that allows this style or script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; style-src {_allowed(STYLE)}; script-src {_allowed(SCRIPT)}; img-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Handler(BaseHTTPRequestHandler):
    timeout = SECONDS

    def __init__(self, classify: Any, lock: threading.Lock, *of_base: Any) -> None:
        self._classify, self._lock = classify, lock
        super().__init__(*of_base)

    def do_GET(self) -> None:
        if self.path != "/" or not self._is_asked_here():
            return self._answer(404, {"error": "there is only the page /"})
        self._send(200, "text/html; charset=utf-8", PAGE.encode())

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._is_asked_here():
            return self._answer(404, {"error": "this server answers to its own address only"})
        if not length.isdecimal() or not 0 < int(length) <= LARGEST:
            return self._answer(413, {"error": f"send a picture of at most {LARGEST // 2**20} MiB"})
        picture = self.rfile.read(int(length))
        try:
            with self._lock:  # one at a time, so that many pictures need the memory of one
                (found,) = self._classify([picture])
        except UserError as error:
            return self._answer(400, {"error": str(error)})
        self._answer(200, [dataclasses.asdict(guess) for guess in found])

    def _is_asked_here(self) -> bool:
        """False for a name that another site has made point to this machine (DNS rebinding)."""
        return self.headers.get("Host", "").rpartition(":")[0] in (HOST, "localhost")

    def _answer(self, status: int, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Connection": "close"}
        headers |= {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Prints nothing: what somebody classifies is nobody else's business."""


def _define_flags(values: flags.FlagValues) -> None:
    cli.define_model(values)
    flags.DEFINE_integer("port", 8000, "Port of 127.0.0.1; 0 is a free one.", 0, flag_values=values)
    flags.DEFINE_integer("top", 5, "Classes per picture.", 1, flag_values=values)
    cli.define_weights(values)
