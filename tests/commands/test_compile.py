"""`jvitmoe compile`: the step for TPUs and GPUs that are not here. The long tests use XLA's compilers for them, from
the folder that JVITMOE_COMPILERS names."""

import json
import os
import subprocess
import sys

import jax
import pytest

import processes
from jvitmoe import experiments, routing, rules
from jvitmoe.commands import compile as compile_command
from jvitmoe.experts import cost
from jvitmoe.machine import targets
from jvitmoe.machine.devices import make_mesh
from jvitmoe.training import build, update

COMPILERS = os.environ.get("JVITMOE_COMPILERS", "")


@pytest.mark.parametrize("text", ["v5e:4x4", "v5p:2x2x2", "h100:8", "h200:8x8", "b200:1"])
def test_a_target_is_named_as_it_was_given(text):
    target = targets.parse(text)
    assert str(target) == text
    assert target.is_gpu == (text[0] in "hb")
    assert target.memory > 10 * targets.GIB


@pytest.mark.parametrize(
    "text", ["", "h100", "h100:", "h100:0", "v9:2x2", "v5e:4x4x4x4", "h100:8 x8", "hl00:8", "h100:2x2x2"]
)
def test_a_target_that_is_none_is_refused_in_one_line(text):
    assert "--target" in processes.refused(compile_command.main, "--config=imagenet", f"--target={text}")


@pytest.mark.parametrize(("target", "extra"), [("h100:8", "gpu-compile"), ("v5e:4x4", "tpu")])
def test_without_a_compiler_one_line_says_what_to_install(monkeypatch, target, extra):
    monkeypatch.setattr(targets, "is_installed", lambda name: False)
    line = processes.refused(compile_command.main, "--config=imagenet", f"--target={target}")
    assert f"pip install 'jvitmoe[{extra}]'" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--config=folder", "--images"),
        ("--config=folder --images=-9", "--images"),
        ("--config=folder --images=9", "--config.model.classes"),
        ("--config=digits_dense --config.data.validation=1437", "config.data.validation"),
    ],
)
def test_what_no_data_tell_must_be_given(arguments, named):
    assert named in processes.refused(compile_command.main, "--target=h100:8", *arguments.split())


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that has no device and takes a GiB for 100 images, as a GPU's does, whatever a device has."""

    def measure(config, target, count):
        size = config.train.batch_size
        return {"peak_bytes": size * targets.GIB // 100, "batch_size": size}

    monkeypatch.setattr(compile_command, "measure", measure)
    monkeypatch.setattr(compile_command, "show", lambda found: None)
    monkeypatch.setattr(targets, "prepare", lambda target: None)


def test_a_batch_that_compiles_and_has_no_memory_is_an_error_after_what_was_found_is_written(compiler, tmp_path):
    flags = ["--config=imagenet", "--target=v5e:2x2", f"--out={tmp_path / 'found.json'}"]
    compile_command.main(["compile.py", *flags, "--config.train.batch_size=1500"])
    assert "config.train.batch_size" in processes.refused(
        compile_command.main, *flags, "--config.train.batch_size=1600"
    )
    assert json.loads((tmp_path / "found.json").read_text())["batch_size"] == 1600


@pytest.mark.parametrize("folder", ["none", "x" * 300])
def test_a_file_that_cannot_be_written_is_refused_before_the_first_program(compiler, tmp_path, folder):
    out = f"--out={tmp_path / folder / 'found.json'}"
    assert "a folder that exists" in processes.refused(
        compile_command.main, "--config=imagenet", "--target=v5e:2x2", out
    )


def test_what_is_measured_is_what_the_devices_of_this_machine_hold_and_move(tiny_config, monkeypatch):
    config = tiny_config(
        routing={"experts": 4, "kind": "sample", "pull": 0.1},
        train={"devices": 4, "expert_devices": 4, "batch_size": 16},
    )
    here = targets.Target("h100", (4,))
    monkeypatch.setattr(targets, "devices", lambda target: jax.devices()[:4])
    found = compile_command.measure(config, here, 100)
    trunk, experts = routing.find(config).shapes()
    own = 4 * (cost.tree_size(trunk) + cost.tree_size(experts) // 4)
    plan = build.plan_for(config, make_mesh(config.train), 100)
    moved = sum(one["bytes"] for one in found["collectives"])
    assert found["bytes"]["parameters"] == own
    assert found["bytes"]["optimiser"] > 2 * own
    assert found["bytes"]["images"] == 100 * (8 * 8 + 4)
    assert 0 <= moved - update.bytes_reduced(plan)(1) <= 4 * 16  # the loss, the accuracy, the experts' norm
    assert not found["float64"]


EXPERT_AXIS = ["--config.train.expert_devices=4", "--config.routing.pull_every=2"]
CASES = [
    *(("v5e:2x4", name, flags) for name, flags in (("cifar10_random", []), ("imagenet:random", EXPERT_AXIS))),
    *(("h100:8", name, flags) for name, flags in (("cifar10_random", []), ("imagenet:random", EXPERT_AXIS))),
    ("h100:8x2", "imagenet", ["--config.train.shard=parameters"]),
    ("h100:8", "imagenet", ["--config.routing.experts=4", "--config.routing.kind=switch"]),
]


def is_donated(found):
    """True if the whole state is updated in place; a TPU keeps the metrics in a tile each."""
    return found["bytes"].get("results not in place", 0) <= 4096


@pytest.mark.long
@pytest.mark.process
@pytest.mark.skipif(not COMPILERS, reason="needs XLA's compilers: `make test-long` installs them")
@pytest.mark.parametrize(("target", "name", "flags"), CASES)
def test_the_step_compiles_for_a_target_in_place_and_moves_what_was_computed(tmp_path, target, name, flags):
    command = [sys.executable, "-m", "jvitmoe", "compile", f"--config={name}", f"--target={target}", *flags]
    environment = {**processes.INHERITED, "PYTHONPATH": os.pathsep.join([str(processes.ROOT), COMPILERS])}
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'found.json'}"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert is_donated(found)
    assert not found["float64"]
    assert "all-to-all" not in {one["kind"] for one in found["collectives"]}
    assert found["peak_bytes"] < found["available_bytes"]
    moved = {place: sum(x["bytes"] for x in found["collectives"] if x["place"] == place) for place in ("step", "some")}
    config = experiments.load(name)
    if flags == EXPERT_AXIS:
        config.train.expert_devices, config.routing.pull_every = 4, 2
        shapes = routing.find(rules.check(config)).shapes()
        trunk, experts = (4 * cost.tree_size(tree) for tree in shapes)
        assert moved["some"] == experts // 4
        assert 0 <= moved["step"] - trunk - experts // 4 <= 64  # two devices hold each expert
    elif not flags:
        dense = 4 * routing.find(config).count_parameters()[0]
        assert 0 <= moved["step"] - dense <= 64
