"""Several real processes on loopback, joined by JAX's own runtime: one run, one result, and no one waits for the dead.

Results are compared within 1e-6 and not bit for bit, because a sum over processes adds the same numbers in another
order.
"""

import os
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

import processes
from jvitmoe import cli, train
from jvitmoe.errors import UserError
from jvitmoe.experts import build
from jvitmoe.runs import fingerprint
from jvitmoe.runs.checkpoints import Checkpoints
from jvitmoe.runtime.devices import make_mesh
from jvitmoe.runtime.processes import join
from jvitmoe.runtime.rendezvous import define_flags
from jvitmoe.training.state import abstract_state
from processes import wait_for_step
from run_folders import losses, rows, saved, saved_config, tiny, write_experiment

pytestmark = pytest.mark.process

STEPS = 12 * (1437 // 128)
CUT = STEPS - 10  # the step from which two processes resume the run of one
EXPERIMENT = tiny(
    data={"validation": 0},
    routing={"experts": 2, "granularity": "sample", "scope": "shared"},
    optim={"learning_rate": 1e-4, "eps": 1e-3},
    train={"epochs": 12, "batch_size": 128, "eval_every": 12, "checkpoint_every": CUT, "devices": 0},
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return write_experiment(tmp_path_factory.mktemp("distributed") / "tiny.py", EXPERIMENT)


@pytest.fixture(scope="module")
def one(experiment):
    """The run of one process with one device, which the others must equal."""
    ended = processes.run(processes.train(experiment, experiment.parent / "one"))
    assert ended.code == 0, ended.err
    return experiment.parent / "one"


def steps_saved(workdir: Path) -> list[int]:
    return [int(path.name) for path in saved(workdir)]


def test_four_processes_stop_together_at_one_signal_and_one_process_takes_their_run_up(experiment, one):
    workdir = experiment.parent / "four"
    command = processes.train(experiment, workdir, "--config.train.expert_devices=2", "--config.train.shard=parameters")
    joined = processes.start_joined(4, command)
    wait_for_step(workdir, 2, joined[0])
    joined[2].process.send_signal(signal.SIGTERM)
    ended = processes.collect(joined)
    assert [e.code for e in ended] == [128 + signal.SIGTERM] * 4, ended
    assert "4 processes" in ended[0].out
    assert "by SIGTERM" in ended[0].out
    for other in ended[1:]:
        assert [line for line in other.out.splitlines() if not line.startswith("[Gloo]")] == []
    (stopped_at,) = steps_saved(workdir)
    assert stopped_at == len(losses(workdir)) < STEPS
    assert losses(workdir) == pytest.approx({n: losses(one)[n] for n in range(1, stopped_at + 1)}, abs=1e-6)

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
    config, expected = saved_config(workdir), checkpoints.check(STEPS)["fingerprint"]  # of the host
    assert any(path.name.endswith(".1") for path in (workdir / "checkpoints" / str(STEPS)).glob("params/*/*"))
    for config.train.devices in (1, 2, 4):
        abstract = abstract_state(config, build.make_model(config, "cpu"), make_mesh(config.train))
        restored, meta = checkpoints.restore(abstract)
        assert meta["step"] == STEPS
        assert fingerprint.of_host(jax.device_get(restored._replace(step=None)._asdict())) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_terminal_reaches_those_of_the_launcher_once(experiment, tmp_path, number):
    plain = ["env", "--default-signal=INT,HUP", "setsid"]  # also if the tests run in the background, or under nohup
    longer = [f"--config.train.{setting}" for setting in ("checkpoint_every=0", "epochs=100", "eval_every=100")]
    command = [*plain, "scripts/launch_node.sh", "2", *processes.train(experiment, tmp_path / "run", *longer)]
    launcher = processes.start(command)
    wait_for_step(tmp_path / "run", 2, launcher)
    os.killpg(launcher.process.pid, number)  # as Ctrl-C, or a terminal that closes, does
    (ended,) = processes.collect([launcher])
    assert ended.code > 128, ended
    assert "stopped at step" in ended.out
    assert "at once" not in ended.err
    assert steps_saved(tmp_path / "run") == [len(losses(tmp_path / "run"))]


@pytest.mark.parametrize(
    ("count", "started", "arguments", "says"),
    [
        (2, [0], ("--join_seconds=3",), "process 0 of 2 waited 3 s for the others"),
        (2, [1], ("--join_seconds=3",), "process 1 of 2 waited 3 s for the others"),
        (2, [0, 1], ("--config.train.batch_size=130",), "130; it must be a multiple of the 2 data devices x 2 e"),
        (2, [0, 1], ("--config.train.devices=4",), "config.train.devices is 4; it must be at most 2"),
    ],
    ids=["too few", "unreachable", "batch", "devices"],
)
def test_a_bad_launch_ends_in_one_line_within_30_seconds(experiment, tmp_path, count, started, arguments, says):
    command = [*processes.train(experiment, tmp_path / "x", *arguments), f"--processes={count}"]
    command.append(f"--coordinator=127.0.0.1:{processes.free_port()}")
    ended = processes.collect([processes.start([*command, f"--process={n}"]) for n in started])
    assert max(e.seconds for e in ended) < 30
    assert [e.code for e in ended] == [2] * len(started), ended
    lines = [line for e in ended for line in e.err.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not (tmp_path / "x").exists()


def test_processes_that_cannot_be_one_run_say_so_in_one_line_each_within_30_seconds(experiment, tmp_path):
    copy = tmp_path / "copy" / "jvitmoe"
    shutil.copytree(processes.ROOT / "jvitmoe", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "training" / "optimizer.py").open("a") as file:
        file.write("# changed\n")
    here, changed = processes.environment(), processes.environment()
    changed |= {"PYTHONPATH": str(copy.parent), "PYTHONSAFEPATH": "1"}
    launches = {  # (number, count, environment) of each process
        "the port is taken by another program": [(0, 2, here), (1, 2, here)],
        "process 1 of 3 was started twice (pid ": [(0, 3, here), (1, 3, here), (1, 3, here)],
        "process 1 was started with --processes=3 and process 0 with --processes=2": [(0, 2, here), (1, 3, here)],
        ") has other code than process 0: training/optimizer.py is ": [(0, 2, here), (1, 2, changed)],
    }
    command = processes.train(experiment, tmp_path / "x", "--join_seconds=120")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        started = []
        for launch, ones in enumerate(launches.values()):
            port = processes.free_port() if launch else taken.getsockname()[1]
            for process, count, env in ones:
                flags = f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={process}"
                started.append(processes.start([*command, *flags], env))
        ended = iter(processes.collect(started))
    for says, ones in launches.items():
        for one in [next(ended) for _ in ones]:
            assert one.code == 2, one
            assert one.seconds < 30
            assert one.err.startswith("error: process ")
            assert one.err.count("\n") == 1
            assert says in one.err
    assert not (tmp_path / "x").exists()


FLIPS = """
import jax
from jvitmoe.runs.checkpoints import CheckpointWriter

save = CheckpointWriter.save

def flip(x):
    first, *others = [shard.data for shard in x.addressable_shards]
    changed = first.at[(0,) * first.ndim].add(1e-6)
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [changed, *others])

def flip_and_save(self, state, *arguments):
    if jax.process_index() == 1 and int(state.step) == 4:
        for tree, name in ((state.params["head"]["logits"], "kernel"), (state.params["blocks"]["mlp"], "up")):
            tree[name] = flip(tree[name])
    return save(self, state, *arguments)

CheckpointWriter.save = flip_and_save
"""


def test_a_value_that_changes_in_the_memory_of_one_process_stops_all_at_the_next_save(tmp_path):
    """One of the changed arrays is whole in every device, the other is split over the devices of each process."""
    experiment = write_experiment(tmp_path / "flips.py", EXPERIMENT, FLIPS)
    command = processes.train(experiment, tmp_path / "x", "--config.train.checkpoint_every=2")
    ended = processes.collect(processes.start_joined(2, [*command, "--config.train.expert_devices=2"], devices=2))
    for process, one in enumerate(ended):
        assert one.code == 2, one
        assert one.err.count("\n") == 1, one.err
        assert "params.blocks.mlp.up of process 1 is not equal to that of process 0 at step 4 " in one.err
        assert "(2 of " in one.err
        assert one.err.endswith(" (process 1 of 2)\n") == (process == 1)
    assert steps_saved(tmp_path / "x") == [2]


def test_processes_given_different_settings_are_refused(experiment, tmp_path):
    command = [*processes.train(experiment, tmp_path / "x"), f"--coordinator=127.0.0.1:{processes.free_port()}"]
    seeds = [["--processes=2", f"--process={n}", f"--config.train.seed={n}"] for n in range(2)]
    ended = processes.collect([processes.start([*command, *seed]) for seed in seeds])
    assert [e.code for e in ended] == [2, 2]
    assert ended[0].err == "error: processes were given different settings; start them all with the same flags\n"
    assert ended[1].err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--processes=2"], "--processes is 2 without --coordinator"),
        (["--process=1"], "--process is 1 without --coordinator"),
        (["--coordinator=localhost:1", "--processes=0"], "--processes is 0; it must be at least 1"),
        (["--coordinator=here"], "--coordinator is 'here'; it must be HOST:PORT"),
        (["--coordinator=no.such.host.invalid:1", "--processes=2"], "its host is not known here"),
        (["--coordinator=localhost:1", "--processes=2", "--process=2"], "--process is 2; it must be from 0 to 1"),
        (["--coordinator=localhost:1", "--join_seconds=0"], "--join_seconds is 0; it must be at least 1"),
        (["--distributed"], "cannot join at what --distributed found"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_before_anybody_is_waited_for(arguments, says):
    from absl import flags

    values = flags.FlagValues()
    define_flags(values)
    values(["train.py", *arguments])
    with pytest.raises(UserError, match=says):
        join(values, dict)


def test_the_launchers_use_flags_and_fields_that_exist(monkeypatch):
    import yaml

    monkeypatch.chdir(processes.ROOT)
    *_, job = yaml.safe_load_all(Path("scripts/kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    line = Path("scripts/slurm.sbatch").read_text().splitlines()[-1]
    slurm = line.replace('"$@"', "--config configs/cifar10_random.py").split()
    for command in (container["command"] + container["args"], slurm[slurm.index("python") :]):
        assert command[:3] == ["python", "-m", "jvitmoe.train"]
        values = cli.parse(["train.py", *command[3:]], train.define_flags, config=True)
        assert values.distributed
        cli.experiment(values)


# What can happen in the middle of training, at signals that nobody else handles: a bug; an error that may as well come
# from the loss of another process; an abort.
FAILS = """
import ctypes, jax, signal

def bug(*_):
    raise RuntimeError("a bug")

def error(*_):
    raise jax.errors.JaxRuntimeError("a bug")

def abort(*_):
    ctypes.CDLL(None).abort()

for number, fault in ((signal.SIGUSR1, bug), (signal.SIGUSR2, error), (signal.SIGVTALRM, abort)):
    signal.signal(number, fault)
"""
FAULTS = [
    (2, 0, signal.SIGKILL),
    (3, 1, signal.SIGKILL),
    (2, 0, signal.SIGSTOP),
    (2, 1, signal.SIGSTOP),
    (2, 0, signal.SIGUSR1),
    (3, 1, signal.SIGUSR1),
    (2, 1, signal.SIGUSR2),
    (2, 1, signal.SIGVTALRM),
]


@pytest.mark.long
def test_a_process_killed_frozen_or_failing_ends_the_others_within_30_seconds_which_name_it(tmp_path, tally):
    """Each run starts while those before it wait to be sure that one is lost."""
    experiment = write_experiment(tmp_path / "fails.py", EXPERIMENT, FAILS)
    long = ("--config.train.epochs=100000", "--config.train.eval_every=100000", "--config.train.checkpoint_every=0")
    sizes = ("--config.train.batch_size=48", "--join_seconds=120")
    started, victims, before, others = [], [], [], []
    try:
        with ThreadPoolExecutor(len(FAULTS)) as pool:
            for number, (count, victim, fault) in enumerate(FAULTS):
                command = processes.train(experiment, tmp_path / str(number), *long, *sizes)
                joined = processes.start_joined(count, command)
                started.extend(joined)
                victims.append(joined.pop(victim))
                wait_for_step(tmp_path / str(number), 2, started[-count])
                before.append([processes.seconds(other) for other in joined])
                victims[-1].process.send_signal(fault)
                if count > 2 and fault == signal.SIGKILL:  # Gloo aborts where what it gets does not fit
                    joined[-1].process.send_signal(signal.SIGVTALRM)
                others.append(pool.submit(processes.collect, joined, 120))
    finally:
        for one in started:
            one.process.kill()  # the frozen ones still are
    for (count, victim, fault), starts, ended in zip(FAULTS, before, others, strict=True):
        for start, other in zip(starts, ended.result(), strict=True):
            assert other.seconds - start < 30, (victim, fault, other)
            assert other.code not in (0, None), (victim, fault, other)
            assert f"process {victim} of {count} is lost" in other.err, (victim, fault, other.err)
    for (count, victim, fault), failed in zip(FAULTS, processes.collect(victims), strict=True):
        if fault in (signal.SIGUSR1, signal.SIGUSR2):
            assert failed.code == 1
            assert "a bug" in failed.err
            assert failed.err.endswith(f"process {victim} of {count} ends, and the others with it\n")
        if fault == signal.SIGVTALRM:
            assert failed.code == -signal.SIGABRT
    tally("processes killed, frozen or failing, and named by their peers within 30 s", len(FAULTS))
