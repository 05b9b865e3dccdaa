"""What may happen to a run, made to happen to real processes in real folders: signals, hangs, full and locked disks,
damage, and two writers."""

import errno
import json
import math
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

import processes
from jvitmoe import evaluate, train
from jvitmoe.errors import UserError
from jvitmoe.runs import lock
from jvitmoe.runs.checkpoints import Checkpoints
from processes import call, wait_for_output, wait_for_step
from run_folders import (
    assert_same_run,
    rows,
    saved,
    snapshot,
    tiny,
    write_experiment,
)

pytestmark = pytest.mark.process

STEPS = 3 * (1337 // 256)
ON_A_TERMINAL = {"TERM": "xterm", **{name: value for name, value in os.environ.items() if name != "COLUMNS"}}
LONG = ("--config.train.epochs=100000", "--config.train.eval_every=100000")
PYTHON = [sys.executable, "-c"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("reliability") / "tiny.py"
    routing = {"experts": 2, "granularity": "sample", "scope": "shared"}
    return write_experiment(path, tiny(routing=routing, train={"checkpoint_every": 3, "keep": 3}))


@pytest.fixture(scope="module")
def uninterrupted(experiment):
    workdir = experiment.parent / "uninterrupted"
    ended = processes.run(processes.train(experiment, workdir))
    assert ended.code == 0, ended.err
    return workdir


@pytest.fixture
def copy(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted, tmp_path / "copy")


def one_error(ended: processes.Ended, message: str) -> None:
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert ended.err.startswith("error: ")
    assert message in ended.err


# asked to stop, stalled, and sick


STOPS = """
import time
from jvitmoe.runtime.signals import Stop

with Stop() as stop:
    stop.unsaved = {unsaved}
    print("ready", flush=True)
    while not stop.asked(0):
        time.sleep(0.01)
    print("asked", stop.asked(0), flush=True)
    time.sleep(100)
"""


def test_a_terminal_that_closes_sends_sighup_twice_and_ends_nothing_at_once():
    one = processes.start([*PYTHON, STOPS.format(unsaved=True)])
    wait_for_output(one, "ready\n")
    one.process.send_signal(signal.SIGHUP)
    wait_for_output(one, f"asked {int(signal.SIGHUP)}\n")
    one.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert one.process.poll() is None
    one.process.send_signal(signal.SIGTERM)
    (ended,) = processes.collect([one], 30)
    assert ended.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("unsaved", [True, False])
def test_a_second_signal_ends_it_at_once_and_so_does_the_first_where_there_is_nothing_to_save(number, unsaved):
    one = processes.start([*PYTHON, STOPS.format(unsaved=unsaved)])
    wait_for_output(one, "ready\n")
    one.process.send_signal(number)
    if unsaved:
        wait_for_output(one, f"asked {int(number)}\n")
        assert one.process.poll() is None
        one.process.send_signal(number)
    (ended,) = processes.collect([one], 30)
    assert ended.code == 128 + number
    assert ended.out.count("\n") == 1 + unsaved


STOPS_ON_A_TERMINAL = """
import sys, time
from jvitmoe.runtime.signals import Stop
from jvitmoe.runs.metrics_log import MetricsLog

with Stop() as stop, MetricsLog(None, 0, 10, 4) as log:
    stop.unsaved = {unsaved}
    while not stop.asked(0):
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("unsaved", [True, False])
def test_ctrl_c_under_the_progress_line_says_so_in_one_line_and_leaves_the_cursor_visible(unsaved):
    terminal, end = pty.openpty()
    # On a terminal of its own, where Ctrl-C is a signal: `pty.fork` would fork this process, which runs JAX's threads.
    command = ["setsid", "--ctty", sys.executable, "-c", STOPS_ON_A_TERMINAL.format(unsaved=unsaved)]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=ON_A_TERMINAL)
    os.close(end)
    shown, deadline = b"", time.monotonic() + processes.HANGS
    try:
        for awaited in [b"compiling", b"asked", None] if unsaved else [b"compiling", None]:
            while awaited is None or awaited not in shown:
                assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], shown
                try:
                    shown += os.read(terminal, 4096)
                except OSError:  # the end
                    break
            if awaited:
                os.write(terminal, b"\x03")
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert b"?25h" in shown.rpartition(b"?25l")[2]
    last = "without saving the last steps" if unsaved else "with no step to save"
    assert shown.endswith(f"\r\nstopped at once by SIGINT, {last}; the same command goes on\r\n".encode())


def test_a_step_that_stalls_shows_all_stacks_and_ends_and_the_folder_can_be_used_again(experiment, tmp_path):
    arguments = ("--config.train.epochs=1", "--config.train.stall_minutes=0.0005")
    ended = processes.run(processes.train(experiment, tmp_path / "run", *arguments))
    assert ended.code == 70, ended
    assert "train.py" in ended.err
    assert 'File "' in ended.err
    assert ended.err.splitlines()[-1].startswith("error: no progress for 0.0005 minutes since ")
    assert not (tmp_path / "run" / "result.json").exists()
    ended = processes.run(processes.train(experiment, tmp_path / "run", arguments[0]))
    assert ended.code == 0, ended.err


HANGS = """
import signal, sys, threading, time
from jvitmoe.runtime.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

with Watchdog(0.05) as watchdog:
    threading.Thread(target=waits_for_ever, daemon=True).start()
    print("ready", flush=True)
    for number in range(12):
        time.sleep(0.5)
        watchdog.progress(f"step {number}")
    print("six seconds of steps", flush=True)
    time.sleep(100)
"""


def test_the_watchdog_leaves_what_moves_and_what_was_itself_stopped_and_ends_what_hangs():
    one = processes.start([*PYTHON, HANGS])
    wait_for_output(one, "ready\n")
    one.process.send_signal(signal.SIGSTOP)
    time.sleep(4)  # longer than the three seconds that it may stall
    one.process.send_signal(signal.SIGCONT)
    (ended,) = processes.collect([one], 120)
    assert ended.out == "ready\nsix seconds of steps\n"
    assert ended.code == 70
    assert "waits_for_ever" in ended.err
    assert "no progress for 0.05 minutes since step 11 (config.train.stall_minutes)" in ended.err


HANGS_IN_C = """
import ctypes
from jvitmoe.runtime.watchdog import Watchdog

def holds_the_lock(seconds):
    ctypes.PyDLL(None).sleep(seconds)

with Watchdog(0.02):
    holds_the_lock(1)
print("awake", flush=True)
with Watchdog(0.02):
    holds_the_lock(60)
"""


def test_the_watchdog_ends_a_hang_that_lets_no_python_thread_run():
    one = processes.start([*PYTHON, HANGS_IN_C])
    wait_for_output(one, "awake\n")
    (ended,) = processes.collect([one], 30)
    assert ended.code == 1
    assert "in holds_the_lock" in ended.err


@pytest.mark.parametrize("routing", [{"experts": 1}, {"experts": 3}, {"experts": 2, "granularity": "sample"}])
def test_a_step_that_is_not_finite_is_skipped_counted_and_changes_nothing(tiny_config, training, routing):
    run = training(tiny_config(routing=routing, train={"ema": 0.9}, optim={"skip_nonfinite": 2})).run(2)
    before = run.history[-1]
    sick = jax.tree.map(lambda x: jnp.full_like(x, 1e30), run.state.params)
    healthy = jax.tree.map(jnp.copy, run.state.params)
    run.state = run.state._replace(params=sick)
    run.run(2)
    for metrics, count in zip(run.metrics[-2:], (1, 2), strict=True):
        assert not math.isfinite(metrics.loss)
        assert (metrics.skipped.total, metrics.skipped.in_a_row) == (count, count)
    after = run.history[-1]
    chex.assert_trees_all_equal((after.opt_state, after.ema), (before.opt_state, before.ema))
    assert all((leaf == jnp.float32(1e30)).all() for leaf in jax.tree.leaves(after.params))
    run.state = run.state._replace(params=healthy)
    run.run(1)
    assert math.isfinite(run.metrics[-1].loss)
    assert (run.metrics[-1].skipped.total, run.metrics[-1].skipped.in_a_row) == (2, 0)
    assert int(run.state.step) == 5


def test_a_run_that_stays_sick_skips_up_to_its_limit_and_names_and_keeps_a_checkpoint_from_before(experiment, tmp_path):
    """A warm-up of two steps begins at learning rate 0: the second update, after step 2, makes all numbers huge."""
    arguments = (
        "--config.optim.learning_rate=1e30",
        f"--config.optim.warmup_epochs={2 / (1337 // 256)}",
        "--config.optim.skip_nonfinite=3",
        "--config.train.checkpoint_every=1",
        "--config.train.keep=2",
    )
    ended = processes.run(processes.train(experiment, tmp_path / "run", *arguments))
    one_error(ended, "it must be finite, but for 3 steps in a row; the last good checkpoint is step 1; ")
    assert ended.out.count(" skipped: ") == 3
    assert [int(path.name) for path in saved(tmp_path / "run")] == [1, 2, 5]  # 2 is not known to be sick; 5 is
    good = Checkpoints(tmp_path / "run" / "checkpoints").read("1")
    assert max(abs(leaf).max() for leaf in good.params.values()) < 10


# one writer


def test_a_second_writer_is_refused_with_the_pid_and_host_of_the_first(experiment, tmp_path):
    workdir = tmp_path / "run"
    first = processes.start(processes.train(experiment, workdir, *LONG))
    wait_for_step(workdir, 1, first)
    before = (workdir / "config.json").read_bytes()
    second = processes.run(processes.train(experiment, workdir, *LONG))
    one_error(second, f"is being written by process {first.process.pid} on {socket.gethostname()!r}")
    assert first.process.poll() is None
    assert (workdir / "config.json").read_bytes() == before
    first.process.kill()
    processes.collect([first])
    third = processes.start(processes.train(experiment, workdir, *LONG))  # takes over the lock of the dead
    deadline = time.monotonic() + 120
    while json.loads((workdir / "lock").read_text() or '{"pid": 0}')["pid"] != third.process.pid:
        assert third.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    third.process.kill()
    processes.collect([third])


# disks


SMALL_DISK = """
set -u
disk=$1 out=$2; shift 2
mount -t tmpfs -o size=${SIZES%% *} tmpfs "$disk"
for size in $SIZES; do
    mount -o remount,size=$size "$disk"
    echo "disk of $size"
    "$@"
    echo "ended with $?"
done
cp -r "$disk/run" "$out"
"""
needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="needs user namespaces, to mount a small disk",
)


@needs_mounts
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_with_room_it_goes_on_to_the_same_bits(
    experiment, uninterrupted, tmp_path
):
    (tmp_path / "disk").mkdir()
    sizes = ("24k", "200k", "320k", "64m")
    mounting = ("unshare", "-rm", "bash", "-c", SMALL_DISK, "bash")
    done = subprocess.run(
        [*mounting, tmp_path / "disk", tmp_path / "run", *processes.train(experiment, tmp_path / "disk" / "run")],
        env={**processes.environment(), "SIZES": " ".join(sizes)},
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    codes = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("ended with")]
    assert codes == [2] * (len(sizes) - 1) + [0], done.stdout + done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(sizes) - 1, done.stderr
    for error in errors:
        assert error.startswith("error: ")
        assert "cannot be written" in error
        assert "make room" in error
    assert any("checkpoint" in error.partition(":")[2][:30] for error in errors), errors
    assert_same_run(tmp_path / "run", uninterrupted)


# Takes away root's right to read and write everything.
WITHOUT_RIGHTS = """
import ctypes, runpy, sys
assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def train_without_rights(experiment: Path, workdir: Path) -> processes.Ended:
    python, _, *module_and_flags = processes.train(experiment, workdir)
    return processes.run([python, "-c", WITHOUT_RIGHTS, *module_and_flags])


def test_a_checkpoint_that_may_not_be_read_is_skipped_and_named(experiment, uninterrupted, copy):
    shutil.rmtree(saved(copy)[-1])
    (copy / "result.json").unlink()
    newest, before = saved(copy)[-1], saved(copy)[-2]
    next(newest.rglob(".zarray")).chmod(0)
    ended = train_without_rights(experiment, copy)
    assert ended.code == 0, ended.err
    assert f"warning: checkpoint {newest.name} skipped: " in ended.out
    assert f"resuming    from step {before.name}" in ended.out
    assert_same_run(copy, uninterrupted)
    assert len(list(copy.glob(f"damaged-checkpoint-{newest.name}-*"))) == 1


@pytest.mark.parametrize(
    ("place", "mode", "message"),
    [
        (".", 0o000, "cannot be listed"),
        ("checkpoints", 0o000, "cannot be"),
        ("checkpoints", 0o555, "cannot be written"),
        ("config.json", 0o000, "cannot be read"),
        ("lock", 0o000, "lock cannot be opened"),
    ],
)
def test_a_folder_that_may_not_be_used_is_one_line_and_stays_as_it_is(experiment, copy, place, mode, message):
    shutil.rmtree(saved(copy)[-1])
    before = {name: text for name, text in snapshot(copy).items() if name.startswith("checkpoints")}
    (copy / place).chmod(mode)
    ended = train_without_rights(experiment, copy)
    (copy / place).chmod(0o755)
    one_error(ended, message)
    assert {name: text for name, text in snapshot(copy).items() if name.startswith("checkpoints")} == before


def test_a_lock_that_does_not_fit_on_the_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(UserError, match=r"lock cannot be written: No space left on device; make room"):
        lock.Lock(tmp_path)


# saying what is sound


def verify(workdir: Path) -> tuple[int, dict[str, str]]:
    """Returns the exit code, and what is said of each part."""
    before = snapshot(workdir)
    code, out, err = call(evaluate.main, f"--workdir={workdir}", "--verify")
    assert err == ""
    assert snapshot(workdir) == before
    return code, {line[:16].strip(): line[17:] for line in out.splitlines()}


def test_verify_calls_every_part_of_a_sound_run_sound(uninterrupted):
    code, found = verify(uninterrupted)
    files = ("config.json", "classes.json", "images.json", "metrics.jsonl", "result.json")
    parts = [*files, *(f"checkpoint {path.name}" for path in saved(uninterrupted))]
    assert (code, found) == (0, dict.fromkeys(parts, "sound"))


def test_a_finished_run_says_what_is_missing_and_writes_a_damaged_result_anew(experiment, uninterrupted, copy):
    (copy / "metrics.jsonl").unlink()
    (copy / "result.json").write_text('{"rows": 3}')
    code, out, err = call(train.main, f"--config={experiment}", f"--workdir={copy}")
    assert (code, err) == (0, "")
    assert f"warning: metrics.jsonl does not hold all that was recorded up to step {STEPS}" in out
    assert "warning: result.json is damaged; it is rewritten" in out
    assert not (copy / "metrics.jsonl").exists()
    assert rows(copy) == rows(uninterrupted)


def test_a_run_that_goes_on_says_when_its_history_was_edited(experiment, copy):
    shutil.rmtree(saved(copy)[-1])
    edit(copy / "metrics.jsonl", '"loss": ', '"loss": 1')
    code, out, err = call(train.main, f"--config={experiment}", f"--workdir={copy}")
    assert (code, err) == (0, "")
    assert "warning: metrics.jsonl does not hold all that was recorded up to step " in out


def flip(path: Path) -> None:
    """Turns the lowest bit of every byte."""
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def edit(path: Path, old: str, new: str) -> None:
    """Replaces the first occurrence."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


VERIFIED = {
    "setting": (
        "config.json",
        lambda run: edit(run / "config.json", '"seed": 0', '"seed": 4'),
        "train.seed differ from",
    ),
    "no history": ("metrics.jsonl", lambda run: (run / "metrics.jsonl").unlink(), "it is missing"),
    "loss": ("metrics.jsonl", lambda run: edit(run / "metrics.jsonl", '"loss": ', '"loss": 1'), "its checksum"),
    "rate": (
        "metrics.jsonl",
        lambda run: edit(run / "metrics.jsonl", 'per_second": ', 'per_second": 1'),
        "its checksum",
    ),
    "lost line": (
        "metrics.jsonl",
        lambda run: edit(run / "metrics.jsonl", (run / "metrics.jsonl").read_text().splitlines(True)[3], ""),
        "its checksum",
    ),
    "lost end": (
        "metrics.jsonl",
        lambda run: edit(run / "metrics.jsonl", (run / "metrics.jsonl").read_text().splitlines(True)[-1], ""),
        "its checksum",
    ),
    "accuracy": (
        "result.json",
        lambda run: edit(run / "result.json", '"accuracy": 0.', '"accuracy": 0.9'),
        "its checksum",
    ),
    "class": ("classes.json", lambda run: edit(run / "classes.json", '"3"', '"7"'), "its checksum"),
    "no class": ("classes.json", lambda run: (run / "classes.json").unlink(), "it is missing"),
    "count": ("images.json", lambda run: edit(run / "images.json", "1337", "1336"), "its checksum"),
    "no counts": ("images.json", lambda run: (run / "images.json").write_text("{"), "is not the numbers of images"),
    "config": ("config.json", lambda run: (run / "config.json").write_text("{"), "not the config of a run"),
    "torn line": ("metrics.jsonl", lambda run: os.truncate(run / "metrics.jsonl", 300), "a line is damaged"),
    "twice": (
        "metrics.jsonl",
        lambda run: (run / "metrics.jsonl").write_text(2 * (run / "metrics.jsonl").read_text()),
        "it has two lines for one step",
    ),
    "result": ("result.json", lambda run: (run / "result.json").write_text("[]"), "is not a result"),
    "data": ("checkpoint {}", lambda run: [flip(path) for path in saved(run)[-1].glob("params/*/[!.]*")], ""),
    "empty": ("checkpoint {}", lambda run: [shutil.rmtree(p) for p in saved(run)[-1].iterdir() if p.is_dir()], ""),
    "none": ("checkpoints", lambda run: [shutil.rmtree(path) for path in saved(run)], "there is none"),
}


@pytest.mark.parametrize("damage", VERIFIED)
def test_verify_names_the_part_that_is_damaged_and_no_other(copy, damage, tally):
    part, make, message = VERIFIED[damage]
    part = part.format(saved(copy)[-1].name)
    make(copy)
    code, found = verify(copy)
    assert code == 1
    assert [name for name, said in found.items() if not said.startswith("sound")] == [part]
    assert message in found[part]
    tally("damaged parts of run folders found by --verify", 1)


# folders from elsewhere


def test_a_run_folder_with_links_is_refused_and_nothing_outside_it_is_touched(experiment, copy, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    for name, target in (("tb", "outside"), ("report.md", "outside/file"), ("config.json.part", "outside/file")):
        workdir = shutil.copytree(copy, tmp_path / f"with {name}")
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(tmp_path / target)
        for main, arguments in ((train.main, (f"--config={experiment}",)), (evaluate.main, ())):
            code, _, err = call(main, *arguments, f"--workdir={workdir}")
            assert (code, err.count("\n")) == (2, 1)
            assert f"{path} is a link" in err
    assert snapshot(tmp_path / "outside") == {"file": b"mine"}
