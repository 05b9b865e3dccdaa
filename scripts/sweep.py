"""Trains variants of an experiment, several seeds each, and reports them in one table. The scripts beside it that list
variants import it.

What a report reads of a finished run is kept in OUT/runs.jsonl.gz (archive.py), and unpacked into OUT/runs for the
report. A sweep that is started again, also from another clone, trains only what the archive has not, and exits where
that was trained with other settings; a run that was stopped goes on from RUNS. What follows `--` on the command line
goes to every `jvitmoe.train`.
"""

import argparse
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import archive
from archive import Run, Runs
from scipy import stats

from jvitmoe import config, rules
from jvitmoe.commands import cli, train
from jvitmoe.commands.sweep import run_jobs
from jvitmoe.data import sources
from jvitmoe.reports import comparison

SEED = "{seed}"  # in the value of a setting: the seed of the run


class Variant(NamedTuple):
    """What a run changes: settings of the config, and which variant of the file it is, such as FILE.py:random."""

    settings: Mapping[str, object]
    of_file: str = "dense"
    against: tuple[str, ...] = ()  # names of the variants that it is compared with, see verdicts.py


def main(
    description: str | None,
    variants: Mapping[str, Variant],
    *,
    evaluate: Sequence[str] = (),
    conclusion: Callable[[Path], str] = lambda out: "",
    arguments: Sequence[str] | None = None,
) -> None:
    """Runs the command line of a script and exits if a run failed; with --dry_run it prints commands and exits.

    Args:
        description: the script's docstring.
        evaluate: flags for every `jvitmoe evaluate`.
        conclusion: returns the end of the report from its folder, which has the archive of the kept runs.
        arguments: of the command line, without those that the script has read itself; None for all.
    """
    options = _options(description, variants, arguments)
    file, kept = options.out / archive.FILE, archive.kept(options.out)
    # Seed by seed, so that a table of all variants can be had after the first third.
    names = [name for name in variants if not options.only or name in options.only]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    every = {f"{name}-seed{seed}": (variants[name], seed) for seed in seeds for name in names}
    todo = {name: item for name, item in every.items() if name not in kept}
    for name, variant in variants.items():  # the report has all that is kept, also of other seeds and without --only
        for run_name, run in tested_runs(kept, name).items():
            seed = int(run_name.removeprefix(f"{name}-seed"))
            if changed := _changed(run, _command(run_name, variant, seed, options), options.runs):
                sys.exit(f"{file}: {run_name} was trained with {changed}; give another --out")
    print(f"{len(every)} runs, {len(every) - len(todo)} of them kept in {file}", flush=True)
    if options.dry_run:
        print("\n".join(shlex.join(["python", "-m", *_command(name, *todo[name], options)]) for name in todo))
        sys.exit()
    options.out.mkdir(parents=True, exist_ok=True)
    options.runs.mkdir(parents=True, exist_ok=True)
    failed = _train(todo, options, evaluate)
    problem = f"{len(failed)} runs failed: {', '.join(failed)}; see their logs in {options.runs}"
    if len(failed) == len(every):
        sys.exit(problem)
    # Also variants that --only left out, and seeds of earlier calls.
    kept = archive.kept(options.out)
    reported = {name: run for variant in variants for name, run in tested_runs(kept, variant).items()}
    archive.write(file, {**reported, **kept})  # in the report's order, whatever ended first
    folders = [str(folder) for folder in archive.unpack(reported, options.out / "runs")]
    subprocess.run([sys.executable, "-m", "jvitmoe", "report", *folders, f"--out={options.out}"], check=True)
    (options.out / "runs.json").unlink()  # the report's record, which the archive has too
    with (options.out / "report.md").open("a") as text:
        shared = (
            f", {options.jobs} runs at a time, each on its share of the CPUs: images/s are those of a shared machine"
        )
        text.write(f"\nWritten by `python {shlex.join(sys.argv)}`{shared if options.jobs > 1 else ''}.\n")
        text.writelines(f"\n{name} failed: {_last_line(options.runs / f'{name}.log')}\n" for name in failed)
        text.write(conclusion(options.out))
    if failed:
        sys.exit(problem)


def flags_of(experiment: str, variant: Variant) -> list[str]:
    """Returns the flags of `jvitmoe.train` that make an experiment the variant."""
    name = experiment if variant.of_file == "dense" else f"{experiment}:{variant.of_file}"
    return [f"--config={name}", *(f"--config.{field}={value}" for field, value in variant.settings.items())]


def config_of(flags: Sequence[str]) -> config.Config:
    """Returns what `jvitmoe.train` trains with these flags."""
    return cli.experiment(cli.parse(["train", *flags], train.define_flags, config=True))


def accuracies(
    runs: Runs, name: str, models: Sequence[str] = ("dense", "merged", "ensemble", "EMA")
) -> dict[str, dict[str, float]]:
    """Returns model -> seed -> accuracy on the test split, %, of a variant's models."""
    found: dict[str, dict[str, float]] = {}
    for run_name, run in tested_runs(runs, name).items():
        by_model = comparison.by_seed([run["result"]])
        for model in models:
            if model in by_model:
                found.setdefault(model, {})[run_name.rpartition("-")[2]] = 100 * by_model[model][0]
    return found


def tested_runs(runs: Runs, name: str) -> dict[str, Run]:
    """Returns the runs of a variant, by name."""
    return {run: runs[run] for run in sorted(runs) if run.startswith(f"{name}-seed")}


def mean_cell(values: Sequence[float]) -> str:
    """Returns the text of a mean ± sample deviation; "-" without values."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def interval(paired: list[float]) -> tuple[float, float]:
    """Returns the 95 % interval (Student's t) of the mean of at least two differences."""
    half = stats.t.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / math.sqrt(len(paired))
    return statistics.fmean(paired) - float(half), statistics.fmean(paired) + float(half)


def _options(
    description: str | None, variants: Mapping[str, Variant], arguments: Sequence[str] | None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a dense experiment")
    parser.add_argument("--runs", type=Path, required=True, help="where the run folders go")
    parser.add_argument("--out", type=Path, required=True, help="where the table goes, and what is kept of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument(
        "--first_seed", type=int, default=0, help="to repeat a result with new seeds, 5 and another --out"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; 1 on a GPU")
    parser.add_argument(
        "--only", nargs="+", choices=variants, metavar="VARIANT", help=f"train these only: {', '.join(variants)}"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands that are missing, run none")
    parser.add_argument("arguments", nargs="*", help="after --: flags for every jvitmoe.train")
    return parser.parse_args(arguments)


def _train(todo: Mapping[str, tuple[Variant, int]], options: argparse.Namespace, evaluate: Sequence[str]) -> list[str]:
    """Trains and evaluates runs, keeps them in the archive, and returns the names of those that failed."""

    def commands(name: str) -> list[list[str]]:
        workdir, training = options.runs / name, _command(name, *todo[name], options)
        testing = ["jvitmoe", "evaluate", f"--workdir={workdir}", *evaluate]
        return [[sys.executable, "-m", *command] for command in (training, testing)]

    def keep(name: str) -> None:  # the archive is read, and written with one run more
        kept = {**archive.kept(options.out), name: _kept(options.runs / name)}
        archive.write(options.out / archive.FILE, kept)

    return run_jobs({name: commands(name) for name in todo}, options.runs, options.jobs, keep)


def _command(name: str, variant: Variant, seed: int, options: argparse.Namespace) -> list[str]:
    """Returns the module and the arguments that train a run."""
    return [
        "jvitmoe.train",
        *(flag.replace(SEED, str(seed)) for flag in flags_of(options.config, variant)),
        f"--config.train.seed={seed}",
        f"--workdir={options.runs / name}",
        *options.arguments,
    ]


def _changed(run: Run, command: list[str], runs: Path) -> str:
    """Returns in words the first setting in which a kept run differs from what a command would train, or ""."""
    kept, new = rules.check(config.from_dict(run["config"])), config_of(command[1:])
    new.model.classes = new.model.classes or kept.model.classes  # 0: as many as the data have, which a run writes down
    new.train.batch_size = new.train.batch_size or kept.train.batch_size
    changed = sources.differences(kept, new)
    source = Path(new.init.source)
    if source.parent == runs and source.name == Path(kept.init.source).name:  # RUNS was another folder then
        changed.pop("init.source", None)
    return next((f"{path}={old!r}, not {new!r}" for path, (old, new) in changed.items()), "")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")


def _kept(workdir: Path) -> Run:
    """Returns what a report reads of a run, without the place of its data on this machine."""
    run = archive.of_folder(workdir)
    run["config"]["data"]["dir"] = ""
    return run
