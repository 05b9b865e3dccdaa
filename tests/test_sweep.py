"""A sweep keeps what a report reads of each run, and trains only what is not kept."""

import importlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

import processes
from jvitmoe import cli, train
from jvitmoe.errors import UserError
from run_folders import write_kept_run

EXPERIMENT = """
from jvitmoe.config import Config, ModelConfig, OptimConfig, TrainConfig, routing_of

def get_config(variant="dense"):
    model = ModelConfig(image_size=8, channels=1, patch=4, width=8, hidden=8, depth=1, heads=2)
    train = TrainConfig(epochs=1, batch_size=256, log_every=2)
    return Config(model=model, routing=routing_of(variant), optim=OptimConfig(warmup_epochs=0), train=train)
"""


def sweep(folder: Path) -> str:
    """Returns what the ablation of a tiny recipe prints, of one seed and two runs."""
    command = [sys.executable, str(processes.ROOT / "scripts" / "ablate_recipe.py"), "--seeds=1"]
    command += [f"--config={folder / 'tiny.py'}", f"--runs={folder / 'runs'}", f"--out={folder / 'out'}"]
    command += ["--only", "dense_recipe", "random_recipe", "--", f"--config.data.dir={folder}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def scripts():
    """Returns the modules of the sweeps: scripts(name)."""
    folder = str(processes.ROOT / "scripts")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


def test_every_variant_is_an_experiment_of_its_own(scripts):
    sweeps = [scripts("ablate_recipe").variants(), *(make() for make in scripts("study").EXPERIMENTS.values())]
    for variants in sweeps:
        configs = []
        for variant in variants.values():
            flags = [f"--config.{field}={value}" for field, value in variant.settings.items()]
            argv = ["train", f"--config=cifar10_fast:{variant.of_file}", *flags]
            configs.append(cli.experiment(cli.parse(argv, train._define_flags, config=True)))
        assert len(set(map(repr, configs))) == len(configs)


def test_the_arms_after_a_search_are_its_best_and_must_all_have_been_tried(scripts, tmp_path):
    study = scripts("study")

    def search(name: str, best: set[str]) -> None:
        for arm in study.EXPERIMENTS[name]():
            write_kept_run(tmp_path / name / "runs" / f"{arm}-seed0", {})
            line = {"step": 2, "kind": "validation", "accuracy": 0.7 if arm in best else 0.6}
            (tmp_path / name / "runs" / f"{arm}-seed0" / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    search("A_search", {"dense_rate4", "sample_rate2_pull1", "sample_rate1_pull0.01", "batch_rate4_pull0.1"})
    arms, searched = study.arms_of("A", tmp_path), study.EXPERIMENTS["A_search"]()
    found = ("dense_rate1", "dense_rate4", "dense_rate2")
    found += ("sample_rate2_pull1", "sample_rate1_pull0.01", "batch_rate4_pull0.1")
    assert list(arms) == ["dense", *found[1:]]
    longer = study.epochs(10)
    assert [*arms.values()] == [(searched[name].settings | longer, searched[name].of_file) for name in found]
    augmented = study.arms_of("A_augmented", tmp_path)
    assert list(augmented) == list(arms)
    assert all(arm.settings == {**arms[name].settings, **study.AUGMENTED} for name, arm in augmented.items())

    search("D_search", {"lora_80_0.001", "adamix_0.0003"})
    tuned, searched = study.arms_of("D", tmp_path), study.EXPERIMENTS["D_search"]()
    assert len(tuned) == 11
    assert next(iter(tuned)) == "dense_80"
    assert (tuned["lora_80"], tuned["adamix"]) == (searched["lora_80_0.001"], searched["adamix_0.0003"])

    shutil.rmtree(tmp_path / "D_search" / "runs" / "adamix_0.003-seed0")
    with pytest.raises(UserError, match=r"D_search has no result of adamix_0\.003; run D_search first"):
        study.arms_of("D", tmp_path)


def test_the_verdict_is_that_of_students_interval(scripts):
    study, paired = scripts("study"), [0.3, 0.5, 0.2, 0.6, 0.4]
    found = study.interval(paired)
    assert found == pytest.approx(stats.ttest_1samp(paired, 0).confidence_interval(0.95))
    assert study.verdict(*found) == "better"
    for shift, verdict in ((-1.0, "worse"), (-0.4, "not decided, loses nothing"), (-0.5, "not decided, loses nothing")):
        assert study.verdict(*study.interval([value + shift for value in paired])) == verdict
    assert study.verdict(*study.interval([2.0, -2.0])) == "not decided"


def test_differences_are_taken_seed_by_seed(scripts, tmp_path):
    study = scripts("study")
    for seed, dense, merged in ((0, 0.80, 0.81), (1, 0.70, 0.72), (2, 0.75, 0.78)):
        write_kept_run(tmp_path / "C" / "runs" / f"dense-seed{seed}", {"dense": dense, "EMA": dense}, reduced=1e9)
        write_kept_run(tmp_path / "C" / "runs" / f"every_8-seed{seed}", {"merged": merged}, reduced=1e8)
    write_kept_run(tmp_path / "C" / "runs" / "every_64-seed1", {"merged": 0.69}, reduced=1e7)
    dense, ema, every_8, every_64, *by_ema = study.verdicts(tmp_path / "C" / "runs", study.EXPERIMENTS["C"]())
    assert {row["minus"] for row in by_ema if row["arm"] != "dense"} == {"dense, EMA"}
    assert [row["difference"] for row in by_ema if row["arm"] == "every_8"] == ["+2.00 (-0.48 to +4.48)"]
    assert study.references(["dense", "dense_rate2", "sample"])[2:] == [("dense_rate2", "dense")]
    assert (dense["accuracy"], dense["difference"]) == ("75.00 ± 5.00", "")
    assert (ema["difference"], ema["verdict"]) == ("+0.00 (+0.00 to +0.00)", "not decided, loses nothing")
    assert every_8["difference"] == "+2.00 (-0.48 to +4.48)"
    assert (every_64["difference"], every_64["verdict"]) == ("-1.00", "")


def test_a_dry_run_of_the_original_s_table_prints_the_commands_of_its_experiments(
    scripts, tmp_path, monkeypatch, capsys
):
    original = scripts("reproduce_original")
    arguments = ["--config=cifar10_dense", "--jobs=1", f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["reproduce_original.py", *arguments, "--dry_run", "--", "--config.data.dir=D"])
    with pytest.raises(SystemExit) as ended:
        scripts("sweep").main("about", original.variants())
    assert not ended.value.code
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("9 runs, 0 of them kept")
    names = ("dense", "switch", "random")
    for line, (seed, name) in zip(lines, itertools.product(range(3), names), strict=True):
        python, m, module, *argv = shlex.split(line)
        assert (python, m, module) == ("python", "-m", "jvitmoe.train")
        expected = cli.load_experiment(f"cifar10_{name}")
        expected.train.seed, expected.data.dir = seed, "D"
        assert cli.experiment(cli.parse(["train", *argv], train._define_flags, config=True)) == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.process
@pytest.mark.slow
def test_a_sweep_started_again_trains_only_what_is_not_kept(scripts, tmp_path):
    (tmp_path / "tiny.py").write_text(EXPERIMENT)
    printed = sweep(tmp_path)
    assert "2 runs, 0 of them kept" in printed
    assert "FAILED" not in printed
    report = (tmp_path / "out" / "report.md").read_text()
    (row,) = re.findall(r"\| recipe \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|", report)
    kept = {folder.name: folder for folder in (tmp_path / "out" / "runs").iterdir()}
    assert set(kept) == {"dense_recipe-seed0", "random_recipe-seed0"}
    for name, model, shown in (("dense_recipe-seed0", "dense", row[0]), ("random_recipe-seed0", "merged", row[2])):
        folder = kept[name]
        result = json.loads((folder / "result.json").read_text())
        (accuracy,) = (r["accuracy"] for r in result["rows"] if r["model"] == model)
        assert float(shown) == pytest.approx(100 * accuracy, abs=0.005)
        assert str(tmp_path) not in (folder / "config.json").read_text()

    for seed in (0, 1):
        shutil.copytree(kept["dense_recipe-seed0"], tmp_path / "original" / f"dense-seed{seed}")
    dense, switch, _ = scripts("reproduce_original").table(tmp_path / "original")
    result = json.loads((kept["dense_recipe-seed0"] / "result.json").read_text())
    assert (dense["seeds"], dense["accuracy"]) == ("2", f"{100 * result['rows'][0]['accuracy']:.2f} ± 0.00")
    assert float(dense["s per 60,000 images"]) == pytest.approx(60_000 / result["images_per_second"], abs=0.005)
    assert (switch["seeds"], switch["accuracy"], switch["original"]) == ("0", "-", "71.1")

    argv = [sys.executable, str(processes.ROOT / "scripts" / "ablate_recipe.py"), "--seeds=1", "--only=dense_recipe"]
    argv += [f"--config={tmp_path / 'tiny.py'}", f"--runs={tmp_path / 'wrong'}", f"--out={tmp_path / 'none'}"]
    ended = subprocess.run([*argv, "--", "--config.train.devices=99"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        1,
        f"1 runs failed: dense_recipe-seed0; see their logs in {tmp_path / 'wrong'}\n",
    )

    # In another clone there are no checkpoints: what is kept is enough, and what is missing is trained again.
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(kept["random_recipe-seed0"])
    printed = sweep(tmp_path)
    assert "2 runs, 1 of them kept" in printed
    assert [folder.name for folder in (tmp_path / "runs").iterdir() if folder.is_dir()] == ["random_recipe-seed0"]
    again = (tmp_path / "out" / "report.md").read_text()
    assert re.findall(r"\| recipe \|.*", again) == re.findall(r"\| recipe \|.*", report)
