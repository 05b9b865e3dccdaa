"""What may happen to a run, made to happen to real processes in real folders: signals, hangs, full and locked disks,
damage, and two writers."""

import errno
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jvitmoe
import processes
from jvitmoe.commands import evaluate, train
from jvitmoe.errors import UserError
from jvitmoe.evaluation import evaluator
from jvitmoe.machine import watchdog
from jvitmoe.runs import folder, safe_io
from jvitmoe.runs.checkpoints import Checkpoints
from jvitmoe.runs.metrics_log import MetricsLog
from jvitmoe.training import loop
from processes import call, refused, succeed, wait_for_output
from run_folders import assert_same_run, saved, snapshot, tiny, write_experiment

pytestmark = pytest.mark.process

STEPS = 3 * (1337 // 256)
ON_A_TERMINAL = {"TERM": "xterm", **{name: value for name, value in os.environ.items() if name != "COLUMNS"}}
PYTHON = [sys.executable, "-c"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("reliability") / "tiny.py"
    dense = {"model": {"dropout": 0.0}, "routing": {"experts": 1, "kind": "batch"}}  # it compiles quickly
    return write_experiment(path, tiny(**dense, train={"checkpoint_every": 3}))


@pytest.fixture(scope="module")
def uninterrupted(experiment):
    workdir = experiment.parent / "uninterrupted"
    ended = processes.run(processes.train(experiment, workdir))
    assert ended.code == 0, ended.err
    return workdir


@pytest.fixture
def copy(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted, tmp_path / "copy")


# asked to stop, and stalled


STOPS = """
import time
from jvitmoe.machine.signals import Stop

with Stop() as stop:
    stop.unsaved = {unsaved}
    print("ready", flush=True)
    while not stop.asked():
        time.sleep(0.01)
    print("asked", stop.asked(), flush=True)
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


@pytest.mark.parametrize("unsaved", [True, False])
def test_a_second_sigterm_ends_it_at_once_and_so_does_the_first_where_there_is_nothing_to_save(unsaved):
    number = signal.SIGTERM
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
from jvitmoe.machine.signals import Stop
from jvitmoe.runs.metrics_log import MetricsLog

with Stop() as stop, MetricsLog(None, 0, 10, 4) as log:
    stop.unsaved = {unsaved}
    while not stop.asked():
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


STALLS = """
import sys
from jvitmoe.commands import cli, train
from jvitmoe.training import loop

loop.STALL_MINUTES = 0.0005
cli.run(train.main)
"""


def test_a_step_that_stalls_shows_all_stacks_and_ends_the_run(experiment, tmp_path):
    ended = processes.run([*PYTHON, STALLS, f"--config={experiment}", f"--workdir={tmp_path / 'run'}"])
    assert ended.code == 70, ended
    assert 'training/loop.py"' in ended.err
    assert ended.err.splitlines()[-1].startswith("error: no progress for 0.0005 minutes since ")
    assert not (tmp_path / "run" / "result.json").exists()


HANGS = """
import signal, sys, threading, time
from jvitmoe.machine.watchdog import Watchdog

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


def test_a_hang_that_holds_python_s_lock_ends_after_90_minutes(monkeypatch):
    armed = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append(seconds))
    watchdog.Watchdog(loop.STALL_MINUTES)._arm()
    assert armed == [90 * 60]


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
    assert "no progress for 0.05 minutes since step 11; " in ended.err


HANGS_IN_C = """
import ctypes
from jvitmoe.machine.watchdog import Watchdog

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


# one writer


def test_a_second_writer_is_refused_with_the_pid_and_host_of_the_first(experiment, copy):
    with folder.lock(copy):
        before = snapshot(copy)
        err = refused(train.main, f"--config={experiment}", f"--workdir={copy}")
        assert f"is being written by process {os.getpid()} on {socket.gethostname()!r}" in err
        assert snapshot(copy) == before


def test_a_lock_that_does_not_fit_on_the_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(UserError, match="lock cannot be written: "), folder.lock(tmp_path):
        pass


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
    sizes = ("24k", "1600k", "64m")  # the second has room for some checkpoints
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
    assert "resuming    from step" in done.stdout  # a run that begins again would have the same bits
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("shown", ["show", "evaluation"])
def test_output_that_nobody_reads_any_more_costs_no_step_and_no_rating(
    experiment, uninterrupted, tmp_path, monkeypatch, shown
):
    as_before, broke_at = getattr(MetricsLog, shown), []

    def show(log, step, *values):
        as_before(log, step, *values)
        if step >= 7 and not broke_at:  # after the checkpoint of step 6; what is written later is dropped
            broke_at.append(step)
            raise UserError("standard output cannot be written: Broken pipe")

    arguments = f"--config={experiment}", f"--workdir={tmp_path / 'run'}"
    with monkeypatch.context() as broken:
        broken.setattr(MetricsLog, shown, show)
        code, _, err = call(train.main, *arguments)
    assert (code, err) == (2, "error: standard output cannot be written: Broken pipe\n")
    stopped = int(saved(tmp_path / "run")[-1].name)
    assert stopped > 7
    nll = Checkpoints(tmp_path / "run" / safe_io.CHECKPOINTS).check(stopped)["nll"]
    assert (nll is not None) == (shown == "evaluation")
    code, out, err = call(train.main, *arguments)
    assert code == 0, err
    assert f"resuming    from step {stopped}\n" in out
    assert_same_run(tmp_path / "run", uninterrupted)


# Takes away root's right to read and write everything, and goes on with each run.
WITHOUT_RIGHTS = """
import ctypes, sys
from jvitmoe.commands import cli, train

assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
config, *runs = sys.argv[1:]
for run in runs:
    sys.argv[1:] = config, f"--workdir={run}"
    try:
        cli.run(train.main)
    except SystemExit as ended:
        print("ended with", ended.code)
"""


def test_a_folder_that_may_not_be_used_is_one_line_and_an_unreadable_checkpoint_is_passed_over(
    experiment, uninterrupted, copy, tmp_path
):
    newest, before = saved(copy)[-1].name, saved(copy)[-2].name
    (copy / "result.json").unlink()
    refused = {  # name of the copy -> what of it gets which mode
        **{"folder": (".", 0o000), "unlisted": ("checkpoints", 0o000), "unwritten": ("checkpoints", 0o555)},
        **{"config": ("config.json", 0o000), "lock": ("lock", 0o000)},
    }
    runs = [shutil.copytree(copy, tmp_path / name) for name in refused]
    for run, (place, mode) in zip(runs, refused.values(), strict=True):
        shutil.rmtree(run / "checkpoints" / newest)
        (run / place).chmod(mode)
    next((copy / "checkpoints" / newest).rglob(".zarray")).chmod(0)
    ended = processes.run([*PYTHON, WITHOUT_RIGHTS, f"--config={experiment}", *runs, copy])
    assert re.findall(r"ended with (\d+)", ended.out) == ["2"] * len(runs) + ["0"], ended
    for line, run in zip(ended.err.splitlines(), runs, strict=True):
        assert re.match("error: .* cannot be ", line)
        assert run.name in line
    for run, (place, _) in zip(runs, refused.values(), strict=True):
        (run / place).chmod(0o755)
        left = {path.name: snapshot(path) for path in saved(run)}
        assert left == {path.name: snapshot(path) for path in saved(uninterrupted) if path.name != newest}
    assert f"warning: checkpoint {newest} skipped: " in ended.out
    assert f"resuming    from step {before}" in ended.out
    assert_same_run(copy, uninterrupted)
    assert len(list(tmp_path.glob(f"copy/damaged-checkpoint-{newest}-*"))) == 1


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


def test_a_finished_run_says_what_is_missing_and_tests_again_with_the_versions_of_its_training(
    experiment, uninterrupted, copy, monkeypatch
):
    monkeypatch.setattr(evaluator, "versions", lambda: {"jax": "of the test"})
    (copy / "metrics.jsonl").unlink()
    (copy / "result.json").write_text('{"rows": 3}')
    out = succeed(train.main, f"--config={experiment}", f"--workdir={copy}")
    assert f"warning: metrics.jsonl does not hold all that was recorded up to step {STEPS}" in out
    assert "warning: result.json is damaged; it is rewritten" in out
    assert not (copy / "metrics.jsonl").exists()
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (uninterrupted, copy))
    assert after["rows"] == before["rows"]
    assert (after["trained_with"], after["versions"]) == (before["versions"], {"jax": "of the test"})


def flip(path: Path) -> None:
    """Turns the lowest bit of every byte."""
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def edit(path: Path, old: str, new: str) -> None:
    """Replaces the first occurrence."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def lose_line(path: Path, number: int) -> None:
    edit(path, path.read_text().splitlines(True)[number], "")


VERIFIED = [  # the part that is damaged, and how
    ("config.json", lambda path: edit(path, '"seed": 0', '"seed": 4')),
    ("config.json", lambda path: path.write_text("{")),
    ("metrics.jsonl", Path.unlink),
    ("metrics.jsonl", lambda path: edit(path, '"loss": ', '"loss": 1')),
    ("metrics.jsonl", lambda path: edit(path, 'per_second": ', 'per_second": 1')),
    ("metrics.jsonl", lambda path: lose_line(path, 3)),
    ("metrics.jsonl", lambda path: lose_line(path, -1)),
    ("metrics.jsonl", lambda path: os.truncate(path, 300)),
    ("metrics.jsonl", lambda path: path.write_text(2 * path.read_text())),
    ("result.json", lambda path: edit(path, '"accuracy": 0.', '"accuracy": 0.9')),
    ("result.json", lambda path: path.write_text("[]")),
    ("classes.json", lambda path: edit(path, '"3"', '"7"')),
    ("classes.json", Path.unlink),
    ("images.json", lambda path: edit(path, "1337", "1336")),
    ("images.json", lambda path: path.write_text("{")),
    (f"checkpoints/{STEPS}", lambda path: [flip(file) for file in path.glob("params/*/[!.]*")]),
    (f"checkpoints/{STEPS}", lambda path: [shutil.rmtree(item) for item in path.iterdir() if item.is_dir()]),
    ("checkpoints", lambda path: [shutil.rmtree(step) for step in path.iterdir()]),
]


@pytest.mark.parametrize(("place", "damage"), VERIFIED)
def test_verify_names_the_part_that_is_damaged_and_no_other(copy, place, damage, tally):
    damage(copy / place)
    code, found = verify(copy)
    assert code == 1
    assert [name for name, said in found.items() if said != "sound"] == [place.replace("checkpoints/", "checkpoint ")]
    tally("damaged parts of run folders found by --verify", 1)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_named_by_every_command_and_none_uses_it(experiment, uninterrupted, copy):
    newest, before = saved(copy)[-1], saved(copy)[-2].name
    path = newest / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["train"]["seed"] = 1
    path.write_text(
        json.dumps(meta | {"checksum": safe_io.checksum({k: v for k, v in meta.items() if k != "checksum"})})
    )
    named = "it is of another run: train.seed is 1, and 0 in config.json"
    code, found = verify(copy)
    assert (code, found.pop(f"checkpoint {newest.name}")) == (1, named)
    assert {*found.values()} == {"sound"}
    skipped = f"warning: checkpoint {newest.name} skipped: ValueError: {named}\n"
    assert skipped in succeed(evaluate.main, f"--workdir={copy}")
    with pytest.warns(RuntimeWarning, match=named):
        jvitmoe.load(copy)
    (copy / "result.json").unlink()
    out = succeed(train.main, f"--config={experiment}", f"--workdir={copy}")
    assert skipped in out
    assert f"resuming    from step {before}\n" in out
    assert_same_run(copy, uninterrupted)


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
            assert f"{path} is a link" in refused(main, *arguments, f"--workdir={workdir}")
    assert snapshot(tmp_path / "outside") == {"file": b"mine"}
