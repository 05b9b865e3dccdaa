"""A sweep keeps what a report reads of each run, and trains only what is not kept."""

import importlib
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

import processes
from jvitmoe import cli, config, experiment_files, train
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
    study = scripts("study")
    names = ("A_search", "B", "C", "D_pretrained", "D_search", "E", "F")
    experiments = {name: study.EXPERIMENTS[name](None) for name in names}
    for name, variants in {"ablation": scripts("ablate_recipe").variants(), **experiments}.items():
        if name != "D_search":  # whose arms are compared in D
            assert {other for variant in variants.values() for other in variant.against} <= {*variants}
        configs = []
        for variant in variants.values():
            flags = [f"--config.{field}={value}" for field, value in variant.settings.items()]
            argv = ["train", f"--config=cifar10_fast:{variant.of_file}", *flags]
            configs.append(cli.experiment(cli.parse(argv, train.define_flags, config=True)))
        assert len(set(map(repr, configs))) == len(configs)


def test_the_arms_after_a_search_are_its_best_and_must_all_have_been_tried(scripts, tmp_path):
    study = scripts("study")

    def search(name: str, best: set[str]) -> dict:
        arms = study.EXPERIMENTS[name](tmp_path)
        for arm in arms:
            write_kept_run(tmp_path / name / "runs" / f"{arm}-seed0", {})
            line = {"step": 2, "kind": "validation", "accuracy": 0.7 if arm in best else 0.6}
            (tmp_path / name / "runs" / f"{arm}-seed0" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return arms

    chosen = ("sample_rate2_pull1", "sample_rate1_pull0.01", "batch_rate4_pull0.1")
    searched = search("A_search", {"dense_rate4", *chosen})
    arms = study.EXPERIMENTS["A"](tmp_path)
    controls = ("dense", "dense_rate4", "dense_rate2")
    assert {name: arm.against for name, arm in arms.items()} == (
        dict(zip(controls, ((), ("dense",), ("dense",)), strict=True)) | dict.fromkeys(chosen, controls)
    )
    for name, arm in arms.items():
        of_search = searched["dense_rate1" if name == "dense" else name]
        assert (arm.settings, arm.of_file) == (of_search.settings | study.epochs(10), of_search.of_file)
    augmented = study.EXPERIMENTS["A_augmented"](tmp_path)
    assert augmented == {name: arm._replace(settings=arm.settings | study.AUGMENTED) for name, arm in arms.items()}

    searched = search("D_search", {"lora_80_0.001", "adamix_0.0003"})
    tuned = study.EXPERIMENTS["D"](tmp_path)
    assert len(tuned) == 13
    assert (tuned["lora_80"], tuned["adamix"]) == (searched["lora_80_0.001"], searched["adamix_0.0003"])
    assert not {name for arm in tuned.values() for name in arm.against} - {*tuned}

    shutil.rmtree(tmp_path / "D_search" / "runs" / "adamix_0.003-seed0")
    with pytest.raises(UserError, match=r"D_search has no result of adamix_0\.003; run D_search first"):
        study.EXPERIMENTS["D"](tmp_path)


def test_the_verdict_is_that_of_students_interval(scripts):
    verdicts, paired = scripts("verdicts"), [0.3, 0.5, 0.2, 0.6, 0.4]
    found = scripts("sweep").interval(paired)
    assert found == pytest.approx(stats.ttest_1samp(paired, 0).confidence_interval(0.95))

    def verdict(paired: list[float]) -> str:
        return verdicts.rows([verdicts.Comparison("a", "merged", "b", "dense", paired)])[0]["verdict"]

    assert verdict(paired) == "better"
    assert verdict([value - 1 for value in paired]) == "worse"
    assert verdict([value - 0.7 for value in paired]) == "worse, loses nothing"
    assert verdict([value - 0.4 for value in paired]) == "not decided, loses nothing, gains nothing"
    wide = [0.8, 0.6, -0.2, 0.4, 0.4]
    assert verdict(wide) == "not decided, loses nothing"
    assert verdict([-value for value in wide]) == "not decided, gains nothing"
    assert verdict([2.0, -2.0]) == "not decided"
    assert verdict([2.0]) == "-"


def test_the_report_of_c_ends_with_the_bytes_of_each_arm(scripts, tmp_path):
    study = scripts("study")
    arms = study.bytes_against_accuracy()
    for arm, model, reduced in (("dense", "dense", 4e9), ("every_1", "merged", 4e9), ("every_8", "merged", 3e9)):
        write_kept_run(tmp_path / f"{arm}-seed0", {model: 0.8}, reduced)
    report = study.communication(tmp_path, arms)
    assert report.startswith(study.verdicts.conclusion(tmp_path, arms))
    rows = ("| dense | 4.00 | 0% |", "| every_1 | 4.00 | 0% |", "| every_8 | 3.00 | 25% |")
    assert report.endswith("\n".join(rows) + "\n")


def test_differences_are_taken_seed_by_seed_from_every_reference(scripts, tmp_path):
    verdicts, variant = scripts("verdicts"), scripts("sweep").Variant
    arms = {
        "dense": variant({}),
        "control": variant({}, against=("dense",)),
        "random": variant({}, "random", ("dense", "control")),
        "once": variant({}, "random", ("dense",)),
        "missing": variant({}, "random", ("dense",)),
    }
    for seed, dense, merged in ((0, 0.80, 0.84), (1, 0.70, 0.75), (2, 0.75, 0.81)):
        write_kept_run(tmp_path / f"dense-seed{seed}", {"dense": dense, "EMA": dense + 0.01})
        write_kept_run(tmp_path / f"control-seed{seed}", {"dense": dense + 0.02})
        write_kept_run(tmp_path / f"random-seed{seed}", {"merged": merged, "EMA": merged, "ensemble": 0.9})
    write_kept_run(tmp_path / "once-seed1", {"merged": 0.69})
    found = verdicts.read(tmp_path, arms)
    rows = verdicts.rows(verdicts.comparisons(found, arms))
    differences = {(row["arm"], row["model"], row["minus"]): row["difference"] for row in rows}
    assert differences == {
        ("control", "dense", "dense, dense"): "+2.00",
        ("control", "dense", "dense, EMA"): "+1.00",
        ("random", "merged", "dense, dense"): "+5.00",
        ("random", "merged", "dense, EMA"): "+4.00",
        ("random", "merged", "control, dense"): "+3.00",
        ("random", "EMA", "dense, EMA"): "+4.00",
        ("random", "ensemble", "dense, dense"): "+15.00",
        ("random", "ensemble", "dense, EMA"): "+14.00",
        ("random", "ensemble", "control, dense"): "+13.00",
        ("once", "merged", "dense, dense"): "-1.00",
        ("once", "merged", "dense, EMA"): "-2.00",
    }
    (row,) = (row for row in rows if (row["arm"], row["model"], row["minus"]) == ("random", "merged", "control, dense"))
    assert (row["interval"], row["verdict"]) == ("+0.52 to +5.48", "better")
    (row,) = (row for row in verdicts.summary(found) if (row["arm"], row["model"]) == ("dense", "dense"))
    assert (row["accuracy"], row["seeds"]) == ("75.00 ± 5.00", "3")
    assert verdicts.conclusion(tmp_path, arms).endswith("compared with: no arm.\n")  # three seeds make no claim
    for seed in (3, 4):
        write_kept_run(tmp_path / f"dense-seed{seed}", {"dense": 0.75, "EMA": 0.76})
        write_kept_run(tmp_path / f"control-seed{seed}", {"dense": 0.77})
        write_kept_run(tmp_path / f"random-seed{seed}", {"merged": 0.80, "EMA": 0.80})
        if seed == 3:
            assert verdicts.conclusion(tmp_path, arms).endswith("compared with: no arm.\n")  # nor do four
    text = verdicts.conclusion(tmp_path, arms)
    assert text.endswith("Better than all that it is compared with: control, random.\n")
    shutil.rmtree(tmp_path / "control-seed2")
    write_kept_run(tmp_path / "control-seed2", {"dense": 0.86})  # random - control: +2, +3, -5
    assert verdicts.conclusion(tmp_path, arms).endswith("compared with: no arm.\n")
    for seed in range(5):
        shutil.rmtree(tmp_path / f"control-seed{seed}")
    assert verdicts.conclusion(tmp_path, arms).endswith("compared with: no arm.\n")  # one reference is not there
    assert "No two arms" in verdicts.conclusion(tmp_path / "none", arms)


def test_a_dry_run_of_the_original_s_table_prints_the_commands_of_its_experiments(
    scripts, tmp_path, monkeypatch, capsys
):
    original = scripts("reproduce_original")
    arguments = ["--config=cifar10_dense", "--jobs=1", f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    arguments += ["--dry_run", "--first_seed=5", "--", "--config.data.dir=D"]
    monkeypatch.setattr(sys, "argv", ["reproduce_original.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(original.__file__, run_name="__main__")
    assert not ended.value.code
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("9 runs, 0 of them kept")
    names = ("dense", "switch", "random")
    for line, (seed, name) in zip(lines, itertools.product(range(5, 8), names), strict=True):
        python, m, module, *argv = shlex.split(line)
        assert (python, m, module) == ("python", "-m", "jvitmoe.train")
        expected = experiment_files.load(f"cifar10_{name}")
        expected.train.seed, expected.data.dir = seed, "D"
        assert cli.experiment(cli.parse(["train", *argv], train.define_flags, config=True)) == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ended", "jobs", "minutes"), [(1, 1, 27), (2, 2, 12), (3, 2, 12), (10, 2, 0)])
def test_the_time_left_is_that_of_runs_side_by_side(scripts, ended, jobs, minutes):
    assert scripts("sweep").minutes_left([180.0] * ended, runs=10, jobs=jobs) == minutes


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
    argv += ["--", "--config.train.devices=99"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        1,
        f"1 runs failed: dense_recipe-seed0; see their logs in {tmp_path / 'wrong'}\n",
    )

    out = tmp_path / "study" / "D_pretrained"
    shutil.copytree(kept["dense_recipe-seed0"], out / "runs" / "dense-seed0")
    argv = [sys.executable, str(processes.ROOT / "scripts" / "study.py"), "D_pretrained", "--seeds=1"]
    argv += [f"--config={tmp_path / 'tiny.py'}", f"--runs={tmp_path / 'pretrained'}", f"--out={out}"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    refusal = f"{out / 'runs' / 'dense-seed0'} was trained with data.name='digits', not 'hf:runs/study/halves/first'"
    assert (ended.returncode, ended.stderr) == (1, f"{refusal}; give another --out\n")
    settings = scripts("study").EXPERIMENTS["D_pretrained"](tmp_path)["dense"].settings
    flags = [f"--config={tmp_path / 'tiny.py'}", *(f"--config.{field}={value}" for field, value in settings.items())]
    asked = cli.experiment(cli.parse(["train", *flags], train.define_flags, config=True))
    (out / "runs" / "dense-seed0" / "config.json").write_text(config.dumps(asked))
    subprocess.run(argv, capture_output=True, check=True)
    assert "study.py D_pretrained --seeds=1" in (out / "report.md").read_text()

    # In another clone there are no checkpoints: what is kept is enough, and what is missing is trained again.
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(kept["random_recipe-seed0"])
    printed = sweep(tmp_path)
    assert "2 runs, 1 of them kept" in printed
    assert [folder.name for folder in (tmp_path / "runs").iterdir() if folder.is_dir()] == ["random_recipe-seed0"]
    again = (tmp_path / "out" / "report.md").read_text()
    assert re.findall(r"\| recipe \|.*", again) == re.findall(r"\| recipe \|.*", report)
