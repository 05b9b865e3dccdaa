"""Whom processes hold for lost, on a key-value store in memory; `test_distributed.py` kills and freezes real ones."""

import threading
import time

import pytest

from jvitmoe.runtime import heartbeat
from jvitmoe.runtime.heartbeat import Heartbeat


class Store:
    """What a heartbeat asks of JAX's coordinator, for all processes at once."""

    def __init__(self):
        self.values, self.lock, self.answers = {}, threading.Lock(), True

    def ask(self):
        if not self.answers:
            raise RuntimeError("UNAVAILABLE")

    def key_value_set(self, key, value, allow_overwrite=False):
        self.ask()
        with self.lock:
            if key in self.values and not allow_overwrite:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value

    def key_value_dir_get(self, prefix):
        self.ask()
        with self.lock:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.fixture
def run(monkeypatch):
    """Three processes that share a store, their beats ten times faster: (store, heartbeats, what each ended with)."""
    for name in ("BEAT", "SILENT", "DETECTION_SECONDS"):
        monkeypatch.setattr(heartbeat, name, getattr(heartbeat, name) / 10)
    monkeypatch.setattr(heartbeat, "PROPAGATION_SECONDS", 2.0)  # a thread of a busy machine may read late
    store, ended = Store(), {}

    def leave(text, code):
        why, who, _ = text.removeprefix("error: ").split("; ")
        process = int(who.split()[1])
        ended.setdefault(process, why)
        if process == 0:
            store.answers = False  # it lives there

    monkeypatch.setattr(heartbeat, "leave", leave)
    monkeypatch.setattr(Heartbeat, "_probe", lambda self: None)
    heartbeats = [Heartbeat(store, "", process, 3) for process in range(3)]
    yield store, heartbeats, ended
    for one in heartbeats:
        one.stop()


def wait(come):
    deadline = time.monotonic() + 20
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_silent_process_is_named_by_all_others_and_not_process_0_for_it(run):
    _, heartbeats, ended = run
    heartbeats[2]._over.set()
    wait(lambda: {0, 1} <= ended.keys())
    assert all("process 2 of 3 is lost (no sign of life" in ended[process] for process in (0, 1))


def test_an_error_while_all_others_live_is_told_to_them(run):
    _, heartbeats, ended = run
    heartbeats[1].announce_unless_lost("its own fault")
    wait(lambda: {0, 2} <= ended.keys())
    assert ended[0] == ended[2] == "process 1 of 3 is lost (its own fault)"


def test_an_error_from_the_loss_of_another_is_not_told_as_ones_own(run):
    _, heartbeats, ended = run
    heartbeats[2]._over.set()
    heartbeats[1].announce_unless_lost("not its own fault")
    wait(lambda: {0, 1} <= ended.keys())
    assert all("process 2 of 3" in ended[process] for process in (0, 1))


def test_one_that_left_as_it_should_is_not_lost_and_not_waited_for(run):
    _, heartbeats, ended = run
    heartbeats[2].stop()
    began = time.monotonic()
    heartbeats[1].announce_unless_lost("its own fault")
    assert time.monotonic() - began < heartbeat.DETECTION_SECONDS
    wait(lambda: 0 in ended)
    assert ended[0] == "process 1 of 3 is lost (its own fault)"


def test_a_store_that_does_not_answer_proves_nobody_alive(run):
    store, heartbeats, ended = run
    store.answers = False
    began = time.monotonic()
    heartbeats[1].announce_unless_lost("perhaps its own fault")
    assert time.monotonic() - began > heartbeat.DETECTION_SECONDS
    assert "process 0 of 3 is lost (RuntimeError: UNAVAILABLE)" in ended[1]
