"""Trackers in their offline or local mode: the same figures, one run per run folder, and none that stops a run."""

import contextlib
import importlib
import json
import os
import sys
import threading
import time

import pytest
import wandb

import jvitmoe
import processes
from jvitmoe.errors import UserError
from jvitmoe.extras import is_installed
from jvitmoe.runs import trackers
from jvitmoe.runs.metrics_log import MetricsLog
from run_folders import tiny

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend
VALUES = {"loss": 1.0, "accuracy": 0.5}
SETTINGS = {"train.epochs": 3, "routing.pattern": ("experts",)}


@pytest.fixture(autouse=True)
def local(tmp_path, monkeypatch):
    """No tracker reaches a network, or a file outside the test's folder."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 300.0)  # a busy machine needs long to import and start some


def follow(workdir, names, start, steps):
    workdir.mkdir(exist_ok=True)
    with MetricsLog(workdir, start, total=10, batch_size=4, trackers=names, settings=SETTINGS) as log:
        for step in steps:
            log.train(step, VALUES | {"loss": step / 4})
        log.evaluation(steps[-1], "test", {"accuracy": 0.25, "nll": 1.5})


def test_wandb_offline_keeps_figures_and_a_resumed_run_has_the_same_id(tmp_path, capsys):
    follow(tmp_path / "a", ["wandb"], 0, [1, 2])
    follow(tmp_path / "a", ["wandb"], 2, [3])
    own = (tmp_path / "a" / "trackers" / "wandb.id").read_text()
    records = sorted((tmp_path / "a" / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert records
    assert {path.name for path in records} == {f"run-{own}.wandb"}
    assert b"train/loss" in b"".join(path.read_bytes() for path in records)
    assert "warning" not in capsys.readouterr().out


def test_a_tracker_that_cannot_start_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    wandb.teardown()  # it keeps the environment of its first use
    monkeypatch.delenv("WANDB_MODE")  # online, without a key
    follow(tmp_path / "a", ["wandb"], 0, [1, 2])
    out = capsys.readouterr().out
    assert out.count("warning: tracker wandb failed (there is no key; run wandb login") == 1
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 3


class Broken(trackers.Tracker):
    def __init__(self, run):
        self.seen = 0

    def record(self, step, seconds, figures):
        self.seen += 1
        if self.seen == 2:
            raise ConnectionError("the server is\ngone")

    def close(self, finished):
        raise AssertionError("a tracker that failed is not used again")


class Hanging(Broken):
    def record(self, step, seconds, figures):
        threading.Event().wait()


def test_a_tracker_that_fails_or_hangs_later_never_stops_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "broken", Broken)
    monkeypatch.setitem(trackers.TRACKERS, "hanging", Hanging)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 5.0)  # TensorBoard's thread needs some on a busy machine
    began = time.monotonic()
    follow(tmp_path / "a", ["broken", "hanging", "tensorboard"], 0, [1, 2, 3, 4])
    assert time.monotonic() - began < 9
    out = capsys.readouterr().out
    assert out.count("tracker broken failed (ConnectionError: the server is gone)") == 1
    assert out.count("tracker hanging did not end in 5 s") == 1
    events = b"".join(path.read_bytes() for path in (tmp_path / "a" / "tb").iterdir())
    assert events.count(b"train/loss") == events.count(b"train/accuracy") == 4
    assert events.count(b"test/nll") == 1


def test_trackers_that_hang_delay_a_stopped_run_by_one_short_wait_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "hanging", Hanging)
    began = time.monotonic()
    with contextlib.suppress(SystemExit), MetricsLog(tmp_path, 0, 10, 4, trackers=["hanging"] * 4) as log:
        log.train(1, VALUES)
        sys.exit(143)
    assert time.monotonic() - began < 6  # a signal promises 10 s, and the state is saved in them too
    assert capsys.readouterr().out.count("tracker hanging did not end in 3 s") == 4


WAITS_AT_EXIT = """
import atexit, sys, threading, time
from pathlib import Path
from jvitmoe.commands import cli, train
from jvitmoe.runs import trackers
from jvitmoe.runs.metrics_log import MetricsLog
from jvitmoe.training import launch

class Hanging(trackers.Tracker):
    def __init__(self, run):
        atexit.register(time.sleep, 100)
    def record(self, step, seconds, figures):
        threading.Event().wait()
    def close(self, finished):
        pass

def run(config, workdir, values, trackers, experiment):
    with MetricsLog(workdir, 0, 10, 4, trackers=trackers) as log:
        log.train(1, {"loss": 1.0, "accuracy": 0.5})
        sys.exit(143)

trackers.TRACKERS["hanging"] = Hanging
launch.launch = run
cli.run(train.main)
"""


@pytest.mark.process
def test_a_tracker_whose_package_waits_at_exit_delays_a_stopped_run_no_longer(tmp_path):
    arguments = "--config=digits_random", f"--workdir={tmp_path}", "--trackers=hanging"
    (ended,) = processes.collect([processes.start([sys.executable, "-c", WAITS_AT_EXIT, *arguments])], 60)
    assert (ended.code, ended.err) == (143, "")
    assert "tracker hanging did not end in 3 s" in ended.out


class Late(trackers.Tracker):
    """Keeps its figures, and notes which files are there when it is closed."""

    def __init__(self, run):
        self.folder, self.figures = run.workdir, {}

    def record(self, step, seconds, figures):
        self.figures |= figures

    def close(self, finished):
        seen = {"files": [path.name for path in self.folder.iterdir()], "figures": self.figures}
        (self.folder.parent / "seen").write_text(json.dumps(seen))


@pytest.mark.slow
def test_a_training_sends_its_last_test_and_writes_its_result_before_it_waits_for_trackers(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "late", Late)
    quick = tiny(
        data={"validation": 0},
        model={"depth": 1, "dropout": 0.0},
        routing={"experts": 1, "kind": "batch"},
        train={"epochs": 1},
    )
    run = jvitmoe.train(quick, tmp_path / "run", trackers=["late"])
    seen = json.loads((tmp_path / "seen").read_text())
    assert {"result.json", "report.md"} <= set(seen["files"])
    assert seen["figures"]["final/dense/accuracy"] == run.accuracy("dense")
    assert not (run.workdir / "tb").exists()


def test_a_folder_that_runs_left_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "left_behind").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("left_behind")  # Python takes it for one
    found = [is_installed(name) for name in ("left_behind", "absent", "absent.part", "tensorboardX")]
    assert found == [False, False, False, True]


@pytest.mark.parametrize("names", [["tensorboard", "wanbd"], ["absent"], ["tensorboard", "tensorboard"]])
def test_a_tracker_that_is_unknown_not_installed_or_named_twice_is_refused_before_training(monkeypatch, names):
    monkeypatch.setitem(trackers.TRACKERS, "absent", type("Absent", (Broken,), {"package": "absent_package"}))
    with pytest.raises(UserError, match=names[-1]):
        trackers.check(names)
