"""Weights of the hub, from a server of this machine that answers as the hub does: no test reaches a network."""

import hashlib
import http.server
import json
import socket
import threading
import time
from pathlib import Path

import chex
import huggingface_hub.constants
import numpy as np
import pytest

import jvitmoe
from jvitmoe.config import ModelConfig
from jvitmoe.errors import UserError
from jvitmoe.interop import download, load, manifest
from jvitmoe.interop.formats import TARGETS

pytestmark = pytest.mark.process  # a download is one

COMMIT = hashlib.sha1(b"jvitmoe").hexdigest()


class Hub:
    """A server with one repository, and the paths that it was asked for."""

    def __init__(self, repository, files, pause=0.0, piece=1):
        """With a pause, weights come in pieces of so many bytes, each so many seconds after the last; for 100 s."""
        self.asked = asked = []
        self.left = left = threading.Event()  # set where a client leaves in the middle of the weights
        about = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        tree = [{"type": "file", "path": n, "size": len(b), "oid": COMMIT} for n, b in files.items()]
        api = f"/api/models/{repository}"
        answers = dict.fromkeys(
            (f"{api}/revision/{name}" for name in ("main", COMMIT, "v1")), json.dumps(about).encode()
        )
        answers |= {f"{api}/tree/{COMMIT}": json.dumps(tree).encode()}
        answers |= {f"/{repository}/resolve/{COMMIT}/{name}": bytes(body) for name, body in files.items()}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self, head=False):
                path = self.path.partition("?")[0]
                asked.append(path)
                body = answers.get(path, b"")
                self.send_response(200 if path in answers else 404)
                if path in answers:
                    self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if not head and pause and path.endswith("safetensors"):
                    self.drip(body)
                elif not head:
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
def exported(tmp_path_factory):
    """Returns the folder of a small ViT as an export for timm writes it."""
    folder, model = tmp_path_factory.mktemp("hub"), ModelConfig(width=8, hidden=12, depth=2, heads=2, norm_epsilon=1e-6)
    rng = np.random.default_rng(0)
    params = {name: 0.2 * rng.normal(size=shape).astype("f") for name, shape in load._shapes(model).items()}
    TARGETS["timm"].write(folder, load.Source(Path("run"), "run", params, model, tuple("abcdefghij")), model)
    manifest.write(folder)
    return folder


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
    ("repository", "name"), [("someone/digits", f"hf://someone/digits@{COMMIT}"), ("timm/vit_x", "timm://vit_x")]
)
def test_an_export_on_the_hub_is_the_same_model_and_is_fetched_once(exported, serve, repository, name):
    files = {path.name: path.read_bytes() for path in exported.iterdir()} | {"pytorch_model.bin": b"pickle"}
    server = serve(repository, files)
    source = load.read(name)
    assert source.notes[0] == f"{name} is commit {COMMIT}"
    fetched = [path.rpartition("/")[2] for path in server.asked if "/resolve/" in path]
    assert {*fetched} == {"model.safetensors", "config.json", "SHA256SUMS"}
    found, wanted = jvitmoe.load(name), jvitmoe.load(exported)
    chex.assert_trees_all_equal(found.params, wanted.params)
    for about in ("config", "names", "crop", "mean", "std"):
        assert getattr(found, about) == getattr(wanted, about)
    fetched = [path for path in server.asked if path.endswith("model.safetensors")]
    assert len(fetched) <= 2  # a question about it, and the file itself


def test_a_bit_that_flips_on_the_way_is_noticed(exported, serve):
    files = {path.name: bytearray(path.read_bytes()) for path in exported.iterdir()}
    files["model.safetensors"][-100] ^= 1
    serve("someone/digits", files)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that SHA256SUMS lists"):
        load.read("hf://someone/digits")


def test_a_repository_without_safetensors_and_one_that_is_absent_are_one_line(serve):
    serve("someone/digits", {"pytorch_model.bin": b"pickle", "config.json": b"{}"})
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load.read("hf://someone/digits")
    with pytest.raises(UserError, match="cannot be fetched"):
        load.read("hf://someone/other")


def test_a_hub_that_accepts_and_never_answers_is_one_line_or_what_was_fetched_before(exported, serve, monkeypatch):
    server = serve("someone/digits", {path.name: path.read_bytes() for path in exported.iterdir()})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silence = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with monkeypatch.context() as patch:
            patch.setattr(load, "ANSWER_SECONDS", 0.2)
            patch.setenv("HF_ENDPOINT", silence)
            with pytest.raises(UserError, match=r"cannot be fetched \(\w*Time\w*: .*timed out.*\); "):
                load.fetch(f"hf://someone/digits@{COMMIT}")
        assert server.asked == []
        folder = load.fetch("hf://someone/digits")
        monkeypatch.setattr(load, "ANSWER_SECONDS", 0.2)
        monkeypatch.setenv("HF_ENDPOINT", silence)
        assert load.fetch("hf://someone/digits") == folder


@pytest.mark.slow
def test_a_hub_that_drips_is_left_and_one_that_is_slow_is_not(serve, monkeypatch):
    """The first is within every time-out of the hub's client, which begins again with each byte."""
    monkeypatch.setattr(download, "WINDOW_SECONDS", 8)  # in which the process also starts
    weights = bytes(20 * download.CHUNK)
    server = serve("someone/drips", {"model.safetensors": weights}, pause=0.1)
    start = time.monotonic()
    with pytest.raises(UserError, match="the hub sends less than 262,144 bytes in 8 s"):
        load.fetch("hf://someone/drips")
    assert time.monotonic() - start < 20
    assert server.left.wait(10)  # nobody goes on with it
    serve("someone/slow", {"model.safetensors": weights}, pause=0.6, piece=download.CHUNK)
    folder = load.fetch("hf://someone/slow")
    assert time.monotonic() - start > 8 + 10  # longer than the window
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["hf://digits", "hf://a/b/c", "hf:///x", "timm://", "timm://a/b"])
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(UserError, match="write hf://OWNER/NAME"):
        load.fetch(name)
