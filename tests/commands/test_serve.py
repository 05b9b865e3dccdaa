"""`jvitmoe serve`: its answers, what it refuses, and the page in a browser."""

import base64
import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import jvitmoe
from jvitmoe.commands import serve
from jvitmoe.errors import UserError
from processes import ROOT, environment, refused

SHIP = ROOT / "docs" / "ship.jpg"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serve.make_server(jvitmoe.load("cifar10_cct"), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def ask(
    port: int, method: str, body: bytes = b"", path: str = "/", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body or None, headers)
    with contextlib.closing(connection), connection.getresponse() as answer:
        return answer.status, dict(answer.headers), answer.read()


def test_a_picture_is_answered_with_the_classes_of_the_model(port):
    status, headers, body = ask(port, "POST", SHIP.read_bytes())
    assert (status, headers["Content-Type"]) == (200, "application/json")
    found = json.loads(body)
    (wanted,) = jvitmoe.load("cifar10_cct")([str(SHIP)])
    assert [(one["name"], one["probability"]) for one in found] == [(one.name, one.probability) for one in wanted]
    assert found[0]["name"] == "ship"


def test_what_is_no_picture_too_large_or_asked_under_another_name_is_refused_in_a_sentence(port, monkeypatch):
    for status, wanted, asked in (
        (400, "cannot be read as an image", {"body": b"no picture"}),
        (413, "send a picture of at most 32 MiB", {}),
        (413, "send a picture of at most 32 MiB", {"body": b"x", "Content-Length": str(serve.LARGEST + 1)}),
        (413, "send a picture of at most 32 MiB", {"body": b"x", "Content-Length": "-1"}),
        (404, "answers to its own address only", {"body": SHIP.read_bytes(), "Host": "evil.example:80"}),
    ):
        found, _, body = ask(port, "POST", **asked)
        assert (found, wanted in json.loads(body)["error"]) == (status, True), asked
    assert ask(port, "GET", Host="evil.example")[0] == 404
    assert ask(port, "GET", path="/etc/passwd")[0] == 404
    status, headers, page = ask(port, "GET")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"http" not in page  # it needs no other server

    monkeypatch.setattr(serve._Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", port)) as slow:  # sends less than it announces
        slow.sendall(b"POST / HTTP/1.1\r\nHost: localhost:1\r\nContent-Length: 100\r\n\r\nx")
        assert ask(port, "POST", SHIP.read_bytes())[0] == 200  # meanwhile others are answered
        slow.settimeout(20)
        assert slow.recv(100) == b""
    assert "--model is missing" in refused(serve.main)
    with pytest.raises(UserError, match=rf"--port is {port}, which cannot be used .*; give another"):
        serve.make_server(lambda pictures: [], port)


@pytest.mark.process
def test_the_command_serves_until_it_is_interrupted():
    command = [sys.executable, "-m", "jvitmoe", "serve", "--model=cifar10_cct", "--port=0", "--top=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        line = process.stdout.readline()
        assert "serving     cifar10_cct at http://127.0.0.1:" in line
        port = int(line.partition("127.0.0.1:")[2].partition(";")[0])
        assert len(json.loads(ask(port, "POST", SHIP.read_bytes())[2])) == 2
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "stopped\n"
    assert process.returncode == 0


class Browser:
    """A headless Chromium, asked through its pipe of the DevTools protocol."""

    def __init__(self, folder: Any, url: str) -> None:
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        flags = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={folder}"
        command = f"exec {shlex.quote(str(BROWSER))} {flags} 3<&{read} 4>&{write}"
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", command], pass_fds=(read, write), **quiet)
        os.close(read)
        os.close(write)
        self._number, self._rest, self._session = 0, b"", {}
        target = self("Target.createTarget", url=url)["targetId"]
        self._session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def __call__(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._read, 2**16)
            one, _, self._rest = self._rest.partition(b"\0")
            if (answer := json.loads(one)).get("id") == self._number:
                return answer["result"]

    def wait_for(self, text: str) -> str:
        for _ in range(300):
            shown = self("Runtime.evaluate", expression="document.body?.innerText ?? ''")["result"]["value"]
            if text in shown:
                return str(shown)
            time.sleep(0.1)
        raise AssertionError(f"the page shows {shown!r}, not {text!r}")

    def drop(self, content: bytes, name: str) -> None:
        file = (
            f"new File([Uint8Array.from(atob('{base64.b64encode(content).decode()}'), c => c.charCodeAt(0))], '{name}')"
        )
        data = f"(() => {{ const data = new DataTransfer(); data.items.add({file}); return data }})()"
        self("Runtime.evaluate", expression=f"dispatchEvent(new DragEvent('drop', {{ dataTransfer: {data} }}))")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.mark.process
@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_a_picture_dropped_on_the_page_shows_its_class_and_a_text_file_a_sentence(port, tmp_path):
    browser = Browser(tmp_path, f"http://127.0.0.1:{port}/")
    with contextlib.closing(browser):
        browser.wait_for("Drop a picture here")
        browser.drop(SHIP.read_bytes(), "ship.jpg")
        assert "92." in browser.wait_for("ship")
        browser.drop(b"no picture", "notes.txt")
        shown = browser.wait_for("cannot be read as an image")
        assert "92." not in shown
