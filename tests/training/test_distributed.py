"""Several real processes on loopback, joined by JAX's own runtime: one run, one result, and no one waits for the dead.

Results are compared within 1e-6 and not bit for bit, because a sum over processes adds the same numbers in another
order.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import processes
from jvitmoe.machine.devices import make_mesh
from jvitmoe.machine.processes import LOST_SECONDS
from jvitmoe.runs import fingerprint
from jvitmoe.runs.checkpoints import Checkpoints
from jvitmoe.training import build
from jvitmoe.training.state import abstract_state
from processes import wait_for_output, wait_for_step
from run_folders import assert_same_run, losses, rows, saved, saved_config, tiny, write_experiment

pytestmark = pytest.mark.process

STEPS = 12 * (1437 // 128)
CUT = STEPS - 10  # the step from which two processes resume the run of one
EXPERIMENT = tiny(
    data={"validation": 0},
    routing={"experts": 2, "kind": "sample"},
    optim={"learning_rate": 1e-4, "eps": 1e-3},
    train={"epochs": 12, "batch_size": 128, "eval_every": 12, "checkpoint_every": CUT, "devices": 0},
)


# Compiled quickly, and once for all tests that use it: a longer run than any test waits for.
QUICK = tiny(
    data={"validation": 0, "crop_padding": 0, "flip": False},
    model={"depth": 1, "dropout": 0.0},
    routing={"experts": 1, "kind": "batch"},
    train={"epochs": 1000, "batch_size": 128, "eval_every": 1000, "checkpoint_every": 0, "devices": 0},
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return write_experiment(tmp_path_factory.mktemp("distributed") / "tiny.py", EXPERIMENT)


@pytest.fixture(scope="module")
def quick(experiment):
    return write_experiment(experiment.with_name("quick.py"), QUICK)


@pytest.fixture(scope="module")
def one(experiment):
    """The run of one process with one device, which the others must equal."""
    ended = processes.run(processes.train(experiment, experiment.parent / "one"))
    assert ended.code == 0, ended.err
    return experiment.parent / "one"


def errors(ended: processes.Ended) -> list[str]:
    """Returns the lines on standard error without JAX's warnings, and without the note that each process has joined."""
    return [line for line in ended.err.splitlines() if not re.match(r"note: process \d|[WE]\d{4} ", line)]


def steps_saved(workdir: Path) -> list[int]:
    return [int(path.name) for path in saved(workdir)]


RECORDS_ROWS = """
import jax
from jvitmoe.data.pictures import Crop

read = Crop.__call__

def record(crop, picture, seed=None):
    if seed:  # (…, step, row), of a training image
        with open(f"FOLDER/{jax.process_index()}", "a") as file:
            print(*seed[-2:], file=file)
    return read(crop, picture, seed)

Crop.__call__ = record
"""


def test_two_processes_stop_together_at_one_signal_and_one_process_takes_their_run_up(experiment, one, tmp_path):
    """They read a stream on two axes of four devices: no row is read by both."""
    workdir = tmp_path / "several"
    records = write_experiment(tmp_path / "rows.py", EXPERIMENT, RECORDS_ROWS.replace("FOLDER", str(tmp_path)))
    axes = [f"--config.{setting}" for setting in ("data.stream", "train.expert_devices=2", "train.shard=parameters")]
    joined = processes.start_joined(2, processes.train(records, workdir, *axes), devices=2)
    wait_for_step(workdir, 2, joined[0])
    joined[1].process.send_signal(signal.SIGINT)  # becomes a SIGTERM, which is JAX's notice of a preemption
    ended = processes.collect(joined)
    assert [e.code for e in ended] == [128 + signal.SIGTERM] * 2, ended
    assert "2 processes" in ended[0].out
    assert "by SIGTERM" in ended[0].out
    # The threads of Gloo write text and line end apart, so that two of its lines may be one line and an empty one.
    assert [line for line in ended[1].out.splitlines() if line and not line.startswith("[Gloo]")] == []
    (stopped_at,) = steps_saved(workdir)
    assert stopped_at == len(losses(workdir)) < STEPS
    assert losses(workdir) == pytest.approx({n: losses(one)[n] for n in range(1, stopped_at + 1)}, abs=1e-6)
    read = [line for process in range(2) for line in (tmp_path / str(process)).read_text().splitlines()]
    assert len(set(read)) == len(read)
    assert {f"{step} {row}" for step in range(stopped_at) for row in range(128)} <= set(read)

    ended = processes.run(processes.train(experiment, workdir))
    assert ended.code == 0, ended.err
    assert f"resuming    from step {stopped_at}" in ended.out
    assert losses(workdir) == pytest.approx(losses(one), abs=1e-6)
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))


GATHERS_NOTHING = """
from jax.experimental import multihost_utils

gather = multihost_utils.process_allgather

def gather_numbers(x, tiled=False):
    assert not (tiled and x.ndim), "a process gathers a whole array"
    return gather(x)

multihost_utils.process_allgather = gather_numbers
"""


def test_two_processes_of_the_node_launcher_take_up_the_run_of_one_and_any_devices_read_their_parts(experiment, one):
    workdir = experiment.parent / "two"
    shutil.copytree(one, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    experiment = write_experiment(experiment.with_name("split.py"), EXPERIMENT, GATHERS_NOTHING)
    split = ("--config.data.stream", "--config.train.shard=parameters")
    ended = processes.run(["scripts/launch_node.sh", "2", *processes.train(experiment, workdir, *split)])
    assert ended.code == 0, ended.err
    assert f"resuming    from step {CUT}" in ended.out
    assert "devices     2 x cpu" in ended.out
    assert losses(workdir) == pytest.approx(losses(one), abs=1e-6)
    assert losses(workdir) != losses(one)  # the last ones are sums of two parts
    merged, other = rows(workdir)[0], rows(one)[0]
    assert merged["images"] == other["images"] == 360
    assert merged["nll"] == pytest.approx(other["nll"], abs=1e-6)

    checkpoints = Checkpoints(workdir / "checkpoints")
    config, expected = saved_config(workdir), checkpoints.check(STEPS)["fingerprints"]  # of the host
    assert any(path.name.endswith(".1") for path in (workdir / "checkpoints" / str(STEPS)).glob("params/*/*"))
    for config.train.devices in (1, 2, 4):
        abstract = abstract_state(build.plan_for(config, make_mesh(config.train), config.train.batch_size))
        restored, meta = checkpoints.restore(abstract)
        assert meta["step"] == STEPS
        assert fingerprint.of_host(jax.device_get(restored._replace(step=None)._asdict())) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_terminal_reaches_those_of_the_launcher_once(tmp_path, number):
    child = """for last; do :; done  # --process=N
trap 'echo >> "$0/told$last"' TERM INT HUP
touch "$0/started$last"
until [[ -e $0/told$last ]]; do sleep 0.1; done
sleep 1
exit 143"""
    plain = ["env", "--default-signal=INT,HUP", "setsid"]  # also if the tests run in the background, or under nohup
    launcher = processes.start([*plain, "scripts/launch_node.sh", "2", "bash", "-c", child, tmp_path])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started*"))) < 2:
        assert time.monotonic() < deadline, "they have not started"
        time.sleep(0.1)
    os.killpg(launcher.process.pid, number)  # as Ctrl-C, or a terminal that closes, does
    (ended,) = processes.collect([launcher], 60)
    assert ended.code == 143, ended
    assert [path.read_text() for path in tmp_path.glob("told*")] == ["\n", "\n"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_processes_whose_launcher_is_killed_stop_with_a_checkpoint(quick, tmp_path):
    launcher = processes.start(["scripts/launch_node.sh", "2", *processes.train(quick, tmp_path / "run")])
    wait_for_step(tmp_path / "run", 2, launcher)
    joined = [pid for pid in children(launcher.process.pid) if "--process=" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(joined) == 2
    try:
        launcher.process.kill()
        deadline = time.monotonic() + 60
        while any(map(running, joined)):
            assert time.monotonic() < deadline, "they still run"
            time.sleep(0.1)
    finally:
        for pid in filter(running, joined):
            os.kill(pid, signal.SIGKILL)
    (ended,) = processes.collect([launcher])
    assert "stopped at step" in ended.out, ended
    assert steps_saved(tmp_path / "run") == [len(losses(tmp_path / "run"))]


def test_a_signal_while_the_launcher_starts_its_processes_reaches_each_that_has_started(tmp_path):
    child = """for last; do :; done  # --process=N
trap 'touch "$0/stopped$last"; exit 143' TERM
touch "$0/started$last"
if [[ $last == --process=0 ]]; then kill -TERM $PPID; fi
for ((i = 0; i < 100; i++)); do sleep 0.1; done"""
    ended = processes.run(["scripts/launch_node.sh", "12", "bash", "-c", child, tmp_path])
    assert ended.code == 143, ended
    reached = {kind: {path.name[7:] for path in tmp_path.glob(f"{kind}*")} for kind in ("started", "stopped")}
    assert set() != reached["started"] <= reached["stopped"]


UNREACHABLE = {  # where process 0 is not -> what is said of it
    "nowhere.invalid": "process 0 does not answer at nowhere.invalid:1: gaierror: ",
    "255.255.255.255": "Network is unreachable",
    "127.0.0.1": "ConnectionRefusedError: ",
}


def test_processes_that_cannot_be_one_run_end_within_30_seconds_and_each_says_why_in_one_line(experiment, tmp_path):
    copy = tmp_path / "copy" / "jvitmoe"
    shutil.copytree(processes.ROOT / "jvitmoe", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "training" / "optimizer.py").open("a") as file:
        file.write("# changed\n")
    changed = {"PYTHONPATH": str(copy.parent), "PYTHONSAFEPATH": "1"}
    other = tmp_path / "other.py"
    other.write_text(experiment.read_text() + "# changed\n")
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "127.0.0.1", "NTASKS": "2", "PROCID": "2", "LOCALID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in slurm.items()}
    found = slurm | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "JAX_COORDINATOR_ADDRESS": "nowhere.invalid:1"}
    failed, late = "process 1 of 2 has failed", "after 4 s (--join_seconds)"
    second = "--processes=2 --process=1 --join_seconds=4"
    elsewhere = f"nowhere.invalid:{processes.free_port()}"
    batch, seed, devices = (f"--config.train.{setting}" for setting in ("batch_size=130", "seed=1", "devices=4"))
    launches = [  # name: of each process, its flags, what it says, and other variables
        ("alone", [("--process=0 --join_seconds=4", late, {})]),
        ("taken", [("--process=0", "Address already in use", {}), ("--process=1 --join_seconds=4", late, {})]),
        ("both", [(f"--process={n} {batch}", "train.batch_size is 130", {}) for n in (0, 1)]),
        ("both", [(f"--process={n} {devices}", "train.devices is 4", {}) for n in (0, 1)]),
        ("one", [("--process=0", failed, {}), (f"--process=1 {seed}", "process 0: train.seed is 1 and not 0", {})]),
        ("one", [("--process=0", failed, {}), ("--process=1", "process 0: source code is ", changed)]),
        ("one", [("--process=0", failed, {}), (f"--process=1 --config={other}", "process 0: experiment file is ", {})]),
        ("not", [("--distributed", "process_id=2, num_processes=2", slurm)]),
        ("not", [("--processes=2", "needs --coordinator=HOST:PORT", {})]),
        ("not", [("--coordinator=here --processes=2", "cannot join by --coordinator=here ", {})]),
        *(("not", [(f"--coordinator={host}:1 {second}", says, {})]) for host, says in UNREACHABLE.items()),
        ("not", [(f"--coordinator={elsewhere} --processes=2 --join_seconds=4", f"not answer at {elsewhere}", {})]),
        ("not", [("--distributed --join_seconds=4", "at nowhere.invalid:1: gaierror", found)]),
    ]
    started = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, launch in launches:
            port = taken.getsockname()[1] if name == "taken" else processes.free_port()
            where = [] if name == "not" else [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
            for given, _, variables in launch:
                command = [*processes.train(experiment, tmp_path / "x", "--join_seconds=120", *where), *given.split()]
                started.append(processes.start(command, processes.environment() | variables))
        ended = processes.collect(started)
    for one, says in zip(ended, [says for _, launch in launches for _, says, _ in launch], strict=True):
        assert one.code == 2, one
        assert one.seconds < 30
        (line,) = errors(one)
        assert line.startswith("error: ")
        assert says in line
    assert not (tmp_path / "x").exists()


def write_sets(root: Path) -> None:
    """Writes two equal image folders, of process 0 and of process 1. All classes have files of the same names, and all
    files have one size."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("flat", "rough")):
            (root / "0" / "set" / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = 100 * label + random.integers(0, 1 + 60 * label, (8, 8))
                path = root / "0" / "set" / split / name / f"{n:02}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path, compress_level=0)
    assert len({path.stat().st_size for path in root.rglob("*.png")}) == 1
    shutil.copytree(root / "0", root / "1")


def renamed(*pairs: tuple[str, str]) -> Callable[[Path], None]:
    """Returns what renames folders of classes, one after the other."""
    return lambda root: [(root / split / old).rename(root / split / new) for split in SPLITS for old, new in pairs]


SPLITS = "train", "test"
OTHER_DATA = [  # what is done to the data of process 1, how they are read, what that process says
    (renamed(("flat", "x"), ("rough", "flat"), ("x", "rough")), True, "hash of train images and labels is "),
    (renamed(("rough", "rugged")), False, "class 1 is rugged and not rough"),
    (lambda root: (root / "train/flat/03.png").unlink(), False, "number of train images is 23 and not 24"),
]


def test_a_process_with_other_data_is_named_with_the_difference_in_one_line_before_the_first_step(tmp_path):
    started = []
    for number, (change, stream, _) in enumerate(OTHER_DATA):
        root = tmp_path / str(number)
        write_sets(root)
        change(root / "1" / "set")
        home = f"import os, sys\nos.environ['HOME'] = f'{root}/' + sys.argv[-1].removeprefix('--process=')\n"
        experiment = write_experiment(root / "folder.py", EXPERIMENT, home)
        settings = ("model.classes=2", "data.name=folder", "data.dir=~/set", f"data.stream={stream}")
        settings += ("train.batch_size=8", "train.checkpoint_every=0")
        command = processes.train(experiment, root / "run", *(f"--config.{setting}" for setting in settings))
        started += processes.start_joined(2, command)
    ended = processes.collect(started)
    for first, second, (_, _, says) in zip(ended[::2], ended[1::2], OTHER_DATA, strict=True):
        assert (first.code, second.code) == (2, 2), (first, second)
        (line,) = errors(first)
        assert line.startswith("error: process 1 of 2 has failed")
        (line,) = errors(second)
        assert line.startswith(f"error: process 1 of 2 differs from process 0: {says}")
    assert not list(tmp_path.glob("*/run"))


FLIPS = """
import jax
from jvitmoe.runs.checkpoint_writer import CheckpointWriter

save = CheckpointWriter.save

def flip(x):
    first, *others = [shard.data for shard in x.addressable_shards]
    changed = first.at[(0,) * first.ndim].add(1e-6)
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [changed, *others])

def flip_and_save(self, state, *arguments):
    if jax.process_index() == 1 and int(state.step) == 4:
        for tree, name in ((state.params.trunk["head"]["logits"], "kernel"), (state.params.experts["mlp"], "up")):
            tree[name] = flip(tree[name])
    return save(self, state, *arguments)

CheckpointWriter.save = flip_and_save
"""


def test_a_value_that_changes_in_the_memory_of_one_process_stops_all_at_the_next_save(tmp_path):
    """One of the changed arrays is whole in every device, the other is split over the devices of each process."""
    experiment = write_experiment(tmp_path / "flips.py", QUICK, FLIPS)
    command = processes.train(experiment, tmp_path / "x", "--config.train.checkpoint_every=2")
    experts = [
        f"--config.{setting}" for setting in ("routing.experts=2", "routing.kind=sample", "train.expert_devices=2")
    ]
    ended = processes.collect(processes.start_joined(2, [*command, *experts], devices=2))
    for one in ended:
        assert one.code == 2, one
        (line,) = errors(one)
        assert "params.trunk.head.logits.kernel on device 0 of process 1 is not equal to that on device 0" in line
        assert "at step 4 (2 of " in line
    assert steps_saved(tmp_path / "x") == [2]


def test_a_loss_that_is_not_finite_ends_all_with_the_same_line(quick, tmp_path):
    command = processes.train(quick, tmp_path / "x", "--config.optim.learning_rate=1e30")
    for one in processes.collect(processes.start_joined(2, command)):
        assert one.code == 2, one
        (line,) = errors(one)
        assert line.startswith("error: loss is nan at step 2; ")


STOPS = """
import sys, time
from absl import flags
from jvitmoe.commands import train
from jvitmoe.machine import processes
from jvitmoe.machine.signals import Stop

values = flags.FlagValues()
train.define_flags(values)
values(sys.argv)
processes.join(train.join_of(values))
with Stop() as stop:
    stop.unsaved = True
    for step in range(10**6):
        if stop.asked():
            break
        if step == 0:
            print("ready", flush=True)
        time.sleep(0.01)
    print("asked at", step, flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_ends_one_of_several_processes_at_once(number):
    joined = processes.start_joined(2, [sys.executable, "-c", STOPS])
    for one in joined:
        wait_for_output(one, "ready\n")
    joined[1].process.send_signal(number)
    for one in joined:
        wait_for_output(one, "asked at")
    for one in reversed(joined):  # process 0 last, which has JAX's coordinator
        one.process.send_signal(signal.SIGTERM)
        one.process.wait()
    ended = processes.collect(joined, 30)
    assert [one.code for one in ended] == [128 + signal.SIGTERM] * 2, ended
    assert ended[0].out.splitlines()[-1] == ended[1].out.splitlines()[-1]
    for one in ended:
        assert errors(one) == ["stopped at once by SIGTERM, without saving the last steps; the same command goes on"]


@pytest.mark.long
@pytest.mark.parametrize("resumed", [False, True])
def test_a_sigterm_at_any_of_24_times_from_the_start_to_step_3_is_never_lost(quick, tmp_path, resumed):
    """Before it has joined, a process ends at once, and the other after it; from then on both stop together. The times
    of resumed runs lie between those of new ones: they differ in what they read at the start."""
    (base := tmp_path / "base").mkdir()
    workdir, times, joins = tmp_path / "run", 24, 0

    def stopped_at(number, folder):
        joined = processes.start_joined(2, processes.train(quick, folder, "--join_seconds=120"))
        start = time.monotonic()
        wait_for_step(folder, number, joined[0])
        seconds = time.monotonic() - start
        joined[0].process.send_signal(signal.SIGTERM)
        processes.collect(joined)
        return seconds

    if resumed:
        stopped_at(3, base)
    shutil.copytree(base, workdir)
    seconds = stopped_at(len(losses(base)) + 3 if resumed else 3, workdir)
    shutil.rmtree(workdir)
    for number in range(times):
        shutil.copytree(base, workdir)
        joined = processes.start_joined(2, processes.train(quick, workdir, "--join_seconds=4"))
        time.sleep(seconds * (number + resumed / 2) / times)
        told = all("note: process" in Path(one.err.name).read_text() for one in joined)
        for one in (joined[1:], joined[:1], joined)[number % 3]:
            one.process.send_signal(signal.SIGTERM)
        codes = [one.code for one in processes.collect(joined, 120)]
        assert 0 not in codes, number
        joins += told
        if told:
            assert codes == [128 + signal.SIGTERM] * 2, number
            assert steps_saved(workdir)[-1] == len(losses(workdir))
        shutil.rmtree(workdir)
    assert joins > times / 2


@pytest.mark.long
def test_a_run_whose_process_is_killed_is_started_again_and_ends_with_the_bits_of_an_uninterrupted_one(
    experiment, tmp_path
):
    """It is process 0, which writes and has JAX's coordinator."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launcher = ["scripts/launch_node.sh", "2"]
    ended = processes.run([*launcher, *processes.train(experiment, whole, "--config.train.checkpoint_every=20")])
    assert ended.code == 0, ended.err
    command = [*launcher, *processes.train(experiment, broken, "--config.train.checkpoint_every=20")]
    started = processes.start(command, processes.environment() | {"RESTARTS": "1"})
    wait_for_step(broken, 50, started)
    (pid,) = (n for n in children(started.process.pid) if "--process=0" in Path(f"/proc/{n}/cmdline").read_text())
    os.kill(pid, signal.SIGKILL)
    (ended,) = processes.collect([started])
    assert ended.code == 0, ended.err
    assert ended.err.count("; all start again (1 of 1 restarts)\n") == 1
    assert re.search(r"resuming +from step \d+0\n", ended.out)  # of a save, before the kill
    assert_same_run(broken, whole)


DIES = """
import os, signal
import jax
from jax.experimental import multihost_utils

wait = multihost_utils.sync_global_devices

def die(name):
    if WHERE in name and jax.process_index() == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    wait(name)

multihost_utils.sync_global_devices = die
"""


@pytest.mark.parametrize(("victim", "where"), [(0, "create_tmp_directory:post"), (1, "old_steps_to_remove")])
def test_a_process_lost_during_a_save_is_not_taken_for_a_full_disk(tmp_path, victim, where):
    """In places where the others wait for it in Orbax, which raises what JAX raises, with no type of its own."""
    code = DIES.replace("WHERE", repr(where)).replace("VICTIM", str(victim))
    experiment = write_experiment(tmp_path / "dies.py", QUICK, code)
    command = processes.train(experiment, tmp_path / "run", "--config.train.checkpoint_every=2")
    ended = processes.collect(processes.start_joined(2, command))
    assert ended[victim].code == -signal.SIGKILL
    other = ended[1 - victim]
    assert other.code not in (0, 2), other
    assert "cannot be written" not in other.err
    assert f"(process {1 - victim} of 2 ends, and so do all; " in other.err


@pytest.mark.parametrize(("codes", "starts"), [((2, 2), 1), ((2, 1), 2), ((1, 2), 2)])
def test_the_launcher_starts_all_again_unless_each_process_ends_for_what_the_user_must_correct(tmp_path, codes, starts):
    child = """for last; do :; done  # --process=N
echo >> "$0/${last#--process=}"
if [[ $last == --process=1 ]]; then sleep 0.5; exit SECOND; fi
exit FIRST"""
    child = child.replace("FIRST", str(codes[0])).replace("SECOND", str(codes[1]))
    command = ["scripts/launch_node.sh", "2", "bash", "-c", child, tmp_path]
    ended = processes.run(command, processes.environment() | {"RESTARTS": "1"})
    assert ended.code == codes[0], ended
    assert [len((tmp_path / name).read_text().splitlines()) for name in "01"] == [starts, starts]


# What can happen in the middle of training, at signals that nobody else handles.
FAILS = """
import ctypes, signal
from jvitmoe.errors import UserError

def fail(error):
    def handle(*_):
        raise error
    return handle

signal.signal(signal.SIGUSR1, fail(RuntimeError("a bug")))
signal.signal(signal.SIGUSR2, fail(UserError("a picture")))
signal.signal(signal.SIGVTALRM, lambda *_: ctypes.CDLL(None).abort())
"""
FAULTS = [  # processes, the one that it happens to, what, whether it saves after each step
    (2, 0, signal.SIGKILL, False),
    (3, 1, signal.SIGKILL, True),
    (2, 0, signal.SIGSTOP, True),
    (3, 1, signal.SIGSTOP, False),
    (2, 1, signal.SIGSTOP, True),
    (2, 0, signal.SIGUSR1, True),
    (3, 1, signal.SIGUSR1, False),
    (2, 1, signal.SIGUSR2, False),
    (2, 1, signal.SIGVTALRM, False),
]


@pytest.mark.long
def test_a_process_killed_frozen_or_failing_ends_the_others_within_40_seconds_and_none_stays(tmp_path, tally):
    """Each run starts while those before it wait to be sure that one is lost."""
    experiment = write_experiment(tmp_path / "fails.py", QUICK, FAILS)
    long = ("--config.train.epochs=100000", "--config.train.eval_every=100000", "--config.train.batch_size=48")
    started, victims, before, others = [], [], [], []
    try:
        with ThreadPoolExecutor(len(FAULTS)) as pool:
            for number, (count, victim, fault, saves) in enumerate(FAULTS):
                often = f"--config.train.checkpoint_every={int(saves)}", "--join_seconds=120"
                joined = processes.start_joined(
                    count, processes.train(experiment, tmp_path / str(number), *long, *often)
                )
                started.extend(joined)
                victims.append(joined.pop(victim))
                wait_for_step(tmp_path / str(number), 3, started[-count])
                before.append([processes.seconds(other) for other in joined])
                victims[-1].process.send_signal(fault)
                others.append(pool.submit(processes.collect, joined, 120))
        for one in victims:
            one.process.send_signal(signal.SIGCONT)  # one that thaws ends too, by itself
        failed = processes.collect(victims, 60)
    finally:
        for one in started:
            one.process.kill()
    for (_, victim, fault, _), starts, ended in zip(FAULTS, before, others, strict=True):
        for start, other in zip(starts, ended.result(), strict=True):
            assert other.seconds - start < 40, (victim, fault, other)
            assert other.code not in (0, 2, None), (victim, fault, other)
            limit = f"JAX ends this one within {2 * LOST_SECONDS} s"
            assert f"if another process is lost, {limit}; start all again" in other.err
            ends = "another task died", "if another process ended before, its output says why; start all again to go on"
            assert any(line in other.err for line in ends), (victim, fault, other.err)
    for (count, victim, fault, _), one in zip(FAULTS, failed, strict=True):
        assert one.code not in (0, None), one
        if fault in (signal.SIGUSR1, signal.SIGUSR2):
            assert one.code == (1 if fault == signal.SIGUSR1 else 2)
            kind = "RuntimeError: a bug" if fault == signal.SIGUSR1 else "a picture"
            assert f"error: {kind} (process {victim} of {count} ends, and so do all; " in one.err
            assert ("Traceback" in one.err) == (fault == signal.SIGUSR1)
    tally("processes of several killed, frozen or failing, whose peers ended within 40 s", len(FAULTS))
