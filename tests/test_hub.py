"""Weights of the hub, from a server of this machine that answers as the hub does: no test reaches a network."""

import hashlib
import http.server
import json
import socket
import threading
import time

import chex
import huggingface_hub.constants
import pytest

import jvitmoe
from jvitmoe.errors import UserError
from jvitmoe.interop import download, load

pytestmark = pytest.mark.process  # a download is one

COMMIT = hashlib.sha1(b"jvitmoe").hexdigest()


class Hub:
    """A server with one repository, and the paths that it was asked for."""

    def __init__(self, repository, files, pause=0.0, piece=1):
        """With a pause, weights come in pieces of so many bytes, each so many seconds after the last; for 100 s."""
        self.asked = asked = []
        self.left = left = threading.Event()  # set where a client leaves in the middle of the weights

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self, head=False):
                path = self.path.partition("?")[0]
                asked.append(path)
                body = None
                if path in (f"/api/models/{repository}/revision/{name}" for name in ("main", COMMIT, "v1")):
                    siblings = [{"rfilename": name} for name in files]
                    body = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
                elif path == f"/api/models/{repository}/tree/{COMMIT}":
                    tree = [{"type": "file", "path": n, "size": len(b), "oid": COMMIT} for n, b in files.items()]
                    body = json.dumps(tree).encode()
                elif path.startswith(start := f"/{repository}/resolve/{COMMIT}/"):
                    body = files.get(path.removeprefix(start))
                self.send_response(200 if body is not None else 404)
                if body is not None:
                    self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                if body and not head and pause and path.endswith("safetensors"):
                    self.drip(body)
                elif body and not head:
                    self.wfile.write(body)

            def drip(self, body):
                for start in range(0, min(len(body), round(100 / pause) * piece), piece):
                    try:
                        self.wfile.write(body[start : start + piece])
                    except OSError:
                        return left.set()
                    time.sleep(pause)

            def do_HEAD(self):
                self.do_GET(head=True)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def exported(experiment_run, tmp_path_factory):
    """Returns the folder of a tiny run's export for timm."""
    return jvitmoe.Run(experiment_run).export("timm", tmp_path_factory.mktemp("hub") / "timm")


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Returns a function that starts a hub with files and lets huggingface_hub use it."""
    servers = []

    def start(repository, files, **pace):
        servers.append(Hub(repository, files, **pace))
        address = f"http://127.0.0.1:{servers[-1].server.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
        for name, value in (settings | {"HF_HUB_CACHE": str(tmp_path / "cache")}).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name, value in (("ENDPOINT", address), ("HUB_CACHE", str(tmp_path / "cache")), ("HUB_DISABLE_XET", "1")):
            monkeypatch.setenv(f"HF_{name}", value)  # for the process that downloads
        return servers[-1]

    yield start
    for hub_server in servers:
        hub_server.server.shutdown()
        hub_server.server.server_close()


@pytest.mark.parametrize(
    ("repository", "name"),
    [
        ("someone/digits", "hf://someone/digits"),
        ("someone/digits", f"hf://someone/digits@{COMMIT}"),
        ("timm/vit_x", "timm://vit_x"),
    ],
)
def test_an_export_on_the_hub_is_the_same_model_and_is_fetched_once(exported, serve, repository, name):
    files = {path.name: path.read_bytes() for path in exported.iterdir()} | {"pytorch_model.bin": b"pickle"}
    server = serve(repository, files)
    source = load.read(name)
    assert source.notes[0] == f"{name} is commit {COMMIT}"
    fetched = {path.rpartition("/")[2] for path in server.asked if "/resolve/" in path}
    assert fetched == {"model.safetensors", "config.json", "SHA256SUMS"}
    found, wanted = jvitmoe.load(name), jvitmoe.load(exported)
    chex.assert_trees_all_equal(found.params, wanted.params)
    for about in ("config", "names", "crop", "mean", "std"):
        assert getattr(found, about) == getattr(wanted, about)
    fetched = [path for path in server.asked if path.endswith("model.safetensors")]
    assert len(fetched) <= 2  # a question about it, and the file itself


def test_a_bit_that_flips_on_the_way_is_noticed(exported, serve):
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    for name in ("model.safetensors", "config.json"):
        content = bytearray(files[name])
        content[-100] ^= 1
        serve(f"someone/{name}", files | {name: bytes(content)})
        with pytest.raises(UserError, match=f"{name} is not the file that SHA256SUMS lists"):
            load.read(f"hf://someone/{name}")


def test_a_repository_without_safetensors_and_one_that_is_absent_are_one_line(serve):
    serve("someone/digits", {"pytorch_model.bin": b"pickle", "config.json": b"{}"})
    with pytest.raises(UserError, match=r"hf://someone/digits' holds no model.safetensors; only safetensors are read"):
        load.read("hf://someone/digits")
    with pytest.raises(UserError, match=r"hf://someone/other' cannot be fetched \(.*; give a folder that you have"):
        load.read("hf://someone/other")


def test_a_hub_that_accepts_and_never_answers_is_one_line_or_what_was_fetched_before(exported, serve, monkeypatch):
    monkeypatch.setattr(load, "ANSWER_SECONDS", 0.2)
    server = serve("someone/digits", {path.name: path.read_bytes() for path in exported.iterdir()})
    with socket.create_server(("127.0.0.1", 0)) as silent, monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("hf://someone/digits", f"hf://someone/digits@{COMMIT}"):
            with pytest.raises(UserError, match=r"cannot be fetched \(\w*Time\w*: .*timed out.*\); "):
                load.fetch(name)
        assert server.asked == []
    monkeypatch.setattr(load, "ANSWER_SECONDS", 60)
    folder = load.fetch("hf://someone/digits")
    monkeypatch.setattr(load, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert load.fetch("hf://someone/digits") == folder


@pytest.mark.slow
def test_a_hub_that_drips_is_left_and_one_that_is_slow_is_not(serve, monkeypatch):
    """The first is within every time-out of the hub's client, which begins again with each byte."""
    monkeypatch.setattr(download, "WINDOW_SECONDS", 8)  # in which the process also starts
    weights = bytes(20 * download.CHUNK)
    server = serve("someone/drips", {"model.safetensors": weights}, pause=0.1)
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"cannot be fetched \(the hub sends less than 262,144 bytes in 8 s\); give a f"
    ):
        load.fetch("hf://someone/drips")
    assert time.monotonic() - start < 20
    assert server.left.wait(10)  # nobody goes on with it
    serve("someone/slow", {"model.safetensors": weights}, pause=0.6, piece=download.CHUNK)
    folder = load.fetch("hf://someone/slow")
    assert time.monotonic() - start > 8 + 10  # longer than the window
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["hf://digits", "hf://a/b/c", "hf:///x", "timm://", "timm://a/b"])
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(UserError, match="write hf://OWNER/NAME@REVISION or timm://NAME"):
        load.fetch(name)
