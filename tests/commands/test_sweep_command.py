"""`jvitmoe sweep`: a search, seeds and a report, with runs that another program may train."""

import json
import shlex
import sys
from pathlib import Path

import pytest

import jvitmoe
from jvitmoe.commands import sweep
from jvitmoe.runs import safe_io
from processes import call, refused, succeed

EXPERIMENT = """
from jvitmoe.config import Config, DataConfig, ModelConfig, TrainConfig, with_variant

def get_config(variant="dense"):
    model = ModelConfig(image_size=8, channels=1, patch=4, width=8, hidden=8, depth=1, heads=2)
    data, train = DataConfig(validation=100), TrainConfig(epochs=1, batch_size=256, log_every=2)
    return with_variant(Config(data=data, model=model, train=train), variant)
"""
# Stands for a program that trains: the accuracy follows from the settings.
TRAINS = """
import sys
from pathlib import Path
from tested_runs import write_tested_run

flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
rate, seed = float(flags["config.optim.learning_rate"]), int(flags.get("config.train.seed", 0))
accuracy = {"a_dense": {0.1: 0.3, 0.2: 0.6}, "a_random": {0.1: 0.8, 0.2: 0.7}}[
    Path(flags["workdir"]).name.rpartition("-")[0]
][rate]
folder = Path(flags["workdir"])
write_tested_run(folder, accuracy, models=("dense",), train__seed=seed, optim__learning_rate=rate)
with (folder / "metrics.jsonl").open("a") as file:
    file.write('{"step": 2, "kind": "validation", "accuracy": %s, "nll": 1}\\n' % accuracy)
"""


@pytest.fixture
def arms(tmp_path: Path) -> list[str]:
    (tmp_path / "a.py").write_text(EXPERIMENT)
    return [f"{tmp_path / 'a.py'}:{variant}" for variant in ("dense", "random")]


@pytest.fixture
def launcher(tmp_path: Path) -> str:
    (tmp_path / "trains.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{TRAINS}")
    return shlex.join([sys.executable, str(tmp_path / "trains.py")])


def test_each_experiment_gets_its_best_rate_and_every_seed_and_the_report_compares_them(arms, launcher, tmp_path):
    flags = ["--rates=0.1,0.2", f"--launcher={launcher}", "--seeds=2", "--jobs=2", f"--out={tmp_path / 'out'}"]
    printed = succeed(sweep.main, *arms, *flags, "--dry_run")
    assert printed.count(launcher) == 4
    assert "then 2 seeds of each" in printed
    assert not (tmp_path / "out").exists()

    printed = succeed(sweep.main, *arms, *flags)
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("out/*/result.json")}
    assert sorted(found) == sorted(
        [f"a_{arm}-rate{rate}" for arm in ("dense", "random") for rate in (0.1, 0.2)]
        + [f"a_{arm}-seed{seed}" for arm in ("dense", "random") for seed in (0, 1)]
    )
    configs = {name: json.loads((tmp_path / "out" / name / safe_io.CONFIG).read_text()) for name in found}
    for seed in (0, 1):
        assert configs[f"a_dense-seed{seed}"]["optim"]["learning_rate"] == 0.2
        assert configs[f"a_random-seed{seed}"]["optim"]["learning_rate"] == 0.1
        assert configs[f"a_random-seed{seed}"]["train"]["seed"] == seed
    assert "30.00% with 0.1, 60.00% with 0.2; the best is the last on its side" in printed
    report = (tmp_path / "out" / "report.md").read_text()
    assert "a_random is 20.00 points above a_dense" in report

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/result.json")}
    succeed(sweep.main, *arms, *flags)  # nothing is trained twice
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/result.json")}


def test_what_is_wrong_is_said_before_a_run_starts_and_jobs_that_wait_in_a_queue_are_awaited(arms, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    for arguments, fault in (
        ([out], "experiments and --out are needed"),
        ([*arms], "experiments and --out are needed"),
        ([arms[0], arms[0], out], "have one name"),
        ([f"{tmp_path / 'b.py'}", out], "does not exist"),
        ([arms[0], out, "--rates=fast"], "learning_rate"),
        ([arms[0], out, "--rates=0.1", "--", "--config.data.validation=0"], "must be above 0 for --rates"),
        ([arms[0], out, "--", "--config.model.depht=3"], "depht"),
        ([*arms, out, f"--launcher={sys.executable} -c pass"], "have not ended; repeat the command when they have"),
        (
            [arms[0], out, f"--launcher={sys.executable} -c 1/0"],
            "a_dense-seed0, a_dense-seed1, a_dense-seed2 failed",
        ),
    ):
        assert fault in refused(sweep.main, *arguments)


@pytest.mark.process
def test_a_sweep_trains_with_the_command_itself_and_goes_on(arms, tmp_path):
    arguments = [arms[0], "--seeds=1", f"--out={tmp_path}", "--", "--trackers=", "--config.train.devices=1"]
    succeed(sweep.main, *arguments)
    assert jvitmoe.Run(tmp_path / "a_dense-seed0").accuracy() > 0
    code, out, _ = call(sweep.main, *arguments)
    assert (code, "1/1  a_dense-seed0  0 min left" in out) == (0, True)
    assert "trained and tested before" in (tmp_path / "a_dense-seed0.log").read_text()
