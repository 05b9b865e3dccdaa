"""A sweep keeps what a report reads of each run, and trains only what is not kept."""

import itertools
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import archive
import pytest
import reproduce_original
import routers
import search_recipe
import sweep
from scipy import stats

import processes
from jvitmoe import config as config_lib
from jvitmoe import experiments, routing
from jvitmoe.experts import cost
from jvitmoe.runs import safe_io
from tested_runs import write_tested_run

EXPERIMENT = """
from jvitmoe.config import Config, ModelConfig, OptimConfig, TrainConfig, with_variant

def get_config(variant="dense"):
    model = ModelConfig(image_size=8, channels=1, patch=4, width=8, hidden=8, depth=1, heads=2)
    train = TrainConfig(epochs=1, batch_size=256, log_every=2)
    return with_variant(Config(model=model, optim=OptimConfig(warmup_epochs=0), train=train), variant)
"""


def command(folder: Path) -> list[str]:
    """Returns the search of a tiny recipe, of one seed and two runs."""
    flags = [f"--config={folder / 'tiny.py'}", f"--runs={folder / 'runs'}", f"--out={folder / 'out'}", "--seeds=1"]
    flags += ["--only", "dense", "random", "--", f"--config.data.dir={folder}"]
    return [sys.executable, str(processes.ROOT / "scripts" / "search_recipe.py"), *flags]


def run_sweep(folder: Path) -> str:
    """Returns what it prints."""
    return subprocess.run(command(folder), capture_output=True, text=True, check=True).stdout


def test_every_variant_is_an_experiment_of_its_own():
    searched = {name: routers.arm(settings) for name, settings in routers.SEARCHED.items()}
    for experiment, variants in (("cifar10_cct", search_recipe.variants()), ("cifar10_fast", searched)):
        configs = [sweep.config_of(sweep.flags_of(experiment, variant)) for variant in variants.values()]
        assert len(set(map(repr, configs))) == len(configs)


@pytest.mark.slow
def test_every_router_of_the_tables_costs_what_dense_costs():
    """Counted by XLA in the compiled forward pass, of two layers at the original's size."""

    counted = {}

    def flops(experiment, settings):
        asked = sweep.config_of(sweep.flags_of(experiment, sweep.Variant(settings)))
        model = routing.find(asked).model()
        if repr(model) not in counted:  # many arms differ in their training only
            counted[repr(model)] = cost.flops_per_image(model, 4)
        return counted[repr(model)]

    study = {name: routers.arm(settings).settings for name, settings in routers.SEARCHED.items()}
    shallow = {"model.depth": 2}
    original = {name: variant.settings for name, variant in reproduce_original.variants().items()}
    original = {name: settings | shallow for name, settings in original.items() if name.startswith("equal_")}
    for experiment, arms, dense in (("cifar10_fast", study, study["dense"]), ("cifar10_dense", original, shallow)):
        once = flops(experiment, dense)
        found = {name: flops(experiment, settings) / once for name, settings in arms.items()}
        assert found == pytest.approx(dict.fromkeys(arms, 1.015), abs=0.02)


def test_the_interval_is_student_s():
    paired = [0.3, 0.5, 0.2, 0.6, 0.4]
    assert sweep.interval(paired) == pytest.approx(stats.ttest_1samp(paired, 0).confidence_interval(0.95))


def test_a_dry_run_of_the_original_s_table_prints_the_commands_of_its_experiments(tmp_path, monkeypatch, capsys):
    arguments = ["--config=cifar10_dense", "--jobs=1", f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    arguments += ["--dry_run", "--", "--config.data.dir=D"]
    monkeypatch.setattr(sys, "argv", ["reproduce_original.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(reproduce_original.__file__, run_name="__main__")
    assert not ended.value.code
    first, *lines = capsys.readouterr().out.splitlines()
    per_seed = 3 + len(routers.ROUTERS)  # with the original's, and dense at another rate
    assert first.startswith(f"{3 * per_seed} runs, 0 of them kept")
    names = ("dense", "switch", "random")
    own = [line for seed in range(3) for line in lines[seed * per_seed :][: len(names)]]
    for line, (seed, name) in zip(own, itertools.product(range(3), names), strict=True):
        python, m, module, *argv = shlex.split(line)
        assert (python, m, module) == ("python", "-m", "jvitmoe.train")
        expected = experiments.load(f"cifar10_{name}")
        expected.train.seed, expected.data.dir = seed, "D"
        assert sweep.config_of(argv) == expected
    assert not list(tmp_path.iterdir())


def test_the_tables_of_the_routers_are_what_their_kept_runs_and_times_say(tmp_path):
    results = processes.ROOT / "results"
    made = routers.draw(results / "routers", routers.table(results, Path()), tmp_path)
    assert made in (results / "routers" / "report.md").read_text()
    assert (tmp_path / "routers.png").read_bytes().startswith(b"\x89PNG")


def test_a_kept_run_whose_classes_were_counted_is_the_run_that_its_flags_would_train(tmp_path):
    command = ["jvitmoe.train", f"--config={processes.ROOT / 'configs' / 'folder.py'}"]
    config = sweep.config_of(command[1:])
    assert config.model.classes == 0
    config.model.classes = 3  # a run writes down how many its folder has
    run = {"config": config_lib.to_dict(config)}
    assert sweep._changed(run, command, tmp_path) == ""
    assert sweep._changed(run, [*command, "--config.model.classes=2"], tmp_path) == "model.classes=3, not 2"


def test_a_kept_run_may_have_started_from_a_run_of_the_sweep_in_another_folder():
    command = ["jvitmoe.train", "--config=digits_dense"]
    config = sweep.config_of(command[1:])
    config.init.source = "there/half-seed1"
    run = {"config": config_lib.to_dict(config)}
    for source, changed in (("here/half-seed1", ""), ("here/half-seed2", "seed2'"), ("other/half-seed1", "seed1'")):
        found = sweep._changed(run, [*command, f"--config.init.source={source}"], Path("here"))
        assert found.endswith(changed)
        assert bool(found) == bool(changed)


@pytest.mark.parametrize("asked", [["--first_seed=1"], ["--only", "other"]])
def test_a_report_has_no_kept_run_of_other_settings_also_none_of_a_seed_or_variant_that_is_not_asked_for(
    tmp_path, asked
):
    (tmp_path / "tiny.py").write_text("from jvitmoe.config import Config\n\ndef get_config():\n    return Config()\n")
    for folder in ("kept", "out"):
        (tmp_path / folder).mkdir()
    write_tested_run(tmp_path / "kept" / "dense-seed0", train__epochs=1)
    archive.write(tmp_path / "out" / archive.FILE, archive.pack([tmp_path / "kept"]))
    variants = {"dense": sweep.Variant({"train.epochs": 1}), "other": sweep.Variant({"model.width": 8})}
    arguments = [f"--config={tmp_path / 'tiny.py'}", f"--runs={tmp_path}", f"--out={tmp_path / 'out'}", "--seeds=1"]
    arguments += [*asked, "--dry_run", "--"]
    with pytest.raises(SystemExit) as ended:
        sweep.main(None, variants, arguments=arguments)
    assert not ended.value.code
    with pytest.raises(SystemExit, match=r"dense-seed0 was trained with train\.epochs=1"):
        sweep.main(None, variants, arguments=[*arguments, "--config.train.epochs=2"])


@pytest.mark.process
@pytest.mark.long
def test_a_sweep_that_gets_sigterm_stops_its_training_which_saves_its_state(tmp_path):
    (tmp_path / "tiny.py").write_text(EXPERIMENT)
    sweeps = subprocess.Popen([*command(tmp_path), "--config.train.epochs=100000"], stdout=subprocess.DEVNULL)
    log = tmp_path / "runs" / "dense-seed0.log"

    def wait_for(text):
        deadline = time.monotonic() + 120
        while not (log.exists() and text in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    wait_for("images/s")
    sweeps.terminate()
    assert sweeps.wait(20) == 128 + signal.SIGTERM
    wait_for("by SIGTERM; the same command goes on")


@pytest.mark.process
@pytest.mark.long
def test_a_sweep_started_again_trains_only_what_is_not_kept(tmp_path):
    (tmp_path / "tiny.py").write_text(EXPERIMENT)
    printed = run_sweep(tmp_path)
    assert "2 runs, 0 of them kept" in printed
    assert "FAILED" not in printed
    report = (tmp_path / "out" / "report.md").read_text()
    shown = dict(re.findall(r"\| (\S+-seed0) \| - \| (\S+) \| ", report))
    kept = archive.kept(tmp_path / "out")
    assert list(kept) == ["dense-seed0", "random-seed0"]
    for name, model in (("dense-seed0", "dense"), ("random-seed0", "merged")):
        (accuracy,) = (r["accuracy"] for r in kept[name]["result"]["rows"] if r["model"] == model)
        assert float(shown[name]) == pytest.approx(100 * accuracy, abs=0.005)
        assert str(tmp_path) not in json.dumps(kept[name]["config"])
        for file in (safe_io.METRICS, safe_io.RESULT):  # as the run left them
            unpacked = tmp_path / "out" / "runs" / name / file
            assert unpacked.read_bytes() == (tmp_path / "runs" / name / file).read_bytes()

    run = kept["dense-seed0"]
    argv = [sys.executable, str(processes.ROOT / "scripts" / "search_recipe.py"), "--seeds=1", "--only=dense"]
    argv += [f"--config={tmp_path / 'tiny.py'}", f"--runs={tmp_path / 'wrong'}", f"--out={tmp_path / 'none'}"]
    argv += ["--", "--config.train.devices=99"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    said = f"1 runs failed: dense-seed0; see their logs in {tmp_path / 'wrong'}\n"
    assert (ended.returncode, ended.stderr) == (1, said)

    # In another clone there are no run folders: the archive is enough, and what is missing is trained again.
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "out" / "runs")
    archive.write(tmp_path / "out" / archive.FILE, {"dense-seed0": run})
    printed = run_sweep(tmp_path)
    assert "2 runs, 1 of them kept" in printed
    assert [folder.name for folder in (tmp_path / "runs").iterdir() if folder.is_dir()] == ["random-seed0"]
    again = (tmp_path / "out" / "report.md").read_text()
    assert dict(re.findall(r"\| (\S+-seed0) \| - \| (\S+) \| ", again)) == shown

    # A further seed joins the earlier ones.
    argv = command(tmp_path)
    argv.remove("random")
    subprocess.run([*argv[:2], "--first_seed=1", *argv[2:]], capture_output=True, check=True)
    assert list(archive.kept(tmp_path / "out")) == ["dense-seed0", "dense-seed1", "random-seed0"]
    assert "| dense | dense | " in (tmp_path / "out" / "report.md").read_text()
