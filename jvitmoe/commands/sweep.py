"""Trains experiments, several seeds each, and compares them: `jvitmoe sweep my.py:dense my.py:mine --out runs/sweep`.

What follows `--` goes to every training, each as --flag=value: `-- --config.data.dir=DIR`. --rates first searches the
learning rate of each experiment, with seed 0, on images held out. Repeat the command to resume. It ends with the report
of `jvitmoe report` and its verdicts. --launcher replaces `python -m jvitmoe.train`, as in --launcher="sbatch
scripts/slurm.sbatch": such jobs end later, so repeat the command then.
"""

import contextlib
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags

from jvitmoe.commands import cli, report, train
from jvitmoe.errors import UserError, first_few
from jvitmoe.runs import safe_io
from jvitmoe.runs.console import console

TRAIN = [sys.executable, "-m", "jvitmoe.train"]
RATE = "optim.learning_rate"


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError."""
    values, arguments = cli.parse_with_arguments(argv, _define_flags, arguments="EXPERIMENT… [-- FLAGS]")
    arms = [one for one in arguments if not one.startswith("-")]
    if not arms or not values.out:
        raise UserError("experiments and --out are needed: jvitmoe sweep my.py:dense my.py:mine --out=runs/sweep")
    extra, program = [one for one in arguments if one.startswith("-")], shlex.split(values.launcher) or TRAIN
    sweep(arms, Path(values.out), values.seeds, values.rates, extra, program, values.jobs, values.dry_run)


def sweep(
    arms: Sequence[str],
    out: Path,
    seeds: int = 3,
    rates: Sequence[str] = (),
    extra: Sequence[str] = (),
    program: Sequence[str] = TRAIN,
    jobs: int = 1,
    dry_run: bool = False,
) -> None:
    """Trains experiments and reports them. The arguments are the flags of the command; `extra` goes to every training.
    Raises UserError for what is no experiment or rate, where runs failed, and where a launcher's have not ended yet."""
    names = {cli.experiment_name(["", f"--config={arm}"]): arm for arm in arms}
    if len(names) < len(arms):
        raise UserError(f"two of {', '.join(arms)} have one name; rename a file")

    def flags_of(name: str, settings: Mapping[str, object]) -> list[str]:
        return [f"--config={names[name]}", *extra, *(f"--config.{path}={value}" for path, value in settings.items())]

    def run_all(runs: Mapping[str, list[str]]) -> None:
        commands = {run: [*program, *given, f"--workdir={out / run}"] for run, given in runs.items()}
        if dry_run:
            console.print("\n".join(map(shlex.join, commands.values())), soft_wrap=True)
            return
        # A run that has ended ends at once again, but a launcher may only queue it.
        todo = {run: [one] for run, one in commands.items() if program == TRAIN or not _has_ended(out / run)}
        safe_io.make_folder(out)
        if failed := run_jobs(todo, out, jobs):
            raise UserError(f"{first_few(failed)} failed; see {out}/NAME.log")
        if absent := [run for run in runs if not _has_ended(out / run)]:
            raise UserError(f"{first_few(absent)} have not ended; repeat the command when they have")

    tries = {f"{name}-rate{rate}": flags_of(name, {RATE: rate}) for name in names for rate in rates}
    for given in [*tries.values()] or [flags_of(name, {}) for name in names]:  # before a run starts
        config = cli.experiment(cli.parse(["train", *given], train.define_flags, config=True))
        if rates and not config.data.validation:
            rule = "which must be above 0 for --rates: they are chosen on images held out"
            raise UserError(f"config.data.validation is 0, {rule}; give -- --config.data.validation=N")
    best: dict[str, dict[str, object]] = {name: {} for name in names}
    if rates:
        run_all(tries)
        if dry_run:
            console.print(f"then {seeds} seeds of each, at the rate that is best on the images held out")
            return
        best = {name: {RATE: _best(out, name, rates)} for name in names}
    order = [(seed, name) for seed in range(seeds) for name in names]
    wanted = {f"{name}-seed{seed}": flags_of(name, best[name] | {"train.seed": seed}) for seed, name in order}
    run_all(wanted)
    if not dry_run:
        report.report([str(out / run) for run in wanted], out)


def _has_ended(workdir: Path) -> bool:
    return (workdir / safe_io.RESULT).exists()


def _best(out: Path, name: str, rates: Sequence[str]) -> str:
    """Returns the rate with the highest accuracy on images held out after the last step, and prints all."""
    found = {}
    for rate in rates:
        lines = safe_io.read_metrics(out / f"{name}-rate{rate}" / safe_io.METRICS)
        found[rate] = [line["accuracy"] for line in lines if line["kind"] == "validation"][-1]
    best = max(found, key=lambda rate: found[rate])
    listed = ", ".join(f"{accuracy:.2%} with {rate}" for rate, accuracy in found.items())
    edge = best in (min(rates, key=float), max(rates, key=float))
    console.print(f"rate        {name}: {listed}{'; the best is the last on its side' * edge}")
    return best


def run_jobs(
    jobs: Mapping[str, Sequence[Sequence[str]]],
    logs: Path,
    at_once: int,
    ended: Callable[[str], None] = lambda name: None,
) -> list[str]:
    """Runs the commands of each job, one after the other, `at_once` jobs at a time, with progress and the time left.
    Returns the names of those that failed; `ended` is called, by one thread at a time, with the others. A job's output
    goes to logs/NAME.log. Where several run, each keeps to CPUs of its own: two runs of one core each train about 1.2
    times as much as two of two cores."""
    can_pin = hasattr(os, "sched_setaffinity")  # macOS cannot
    cpus = sorted(os.sched_getaffinity(0)) if can_pin else []
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(at_once):
        shares.put(cpus[job::at_once] or cpus)
    running, saving, seconds = set[subprocess.Popen[bytes]](), threading.Lock(), list[float]()

    def run(name: str) -> int:
        share, began = shares.get(), time.monotonic()
        try:
            with (logs / f"{name}.log").open("a") as log:
                for command in jobs[name]:
                    process = subprocess.Popen(command, stdout=log, stderr=log)
                    running.add(process)
                    if can_pin:
                        with contextlib.suppress(ProcessLookupError):  # it has ended
                            os.sched_setaffinity(process.pid, share)
                    code = process.wait()
                    running.discard(process)
                    if code:
                        return code
        finally:
            seconds.append(time.monotonic() - began)
            shares.put(share)
        with saving:
            ended(name)
        return 0

    def stop(number: int, _: object) -> None:
        for process in list(running):  # a copy, because jobs change the set; a training saves its state
            process.terminate()
        os._exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    failed = []
    with ThreadPoolExecutor(at_once) as pool:
        for done, (name, code) in enumerate(zip(jobs, pool.map(run, jobs), strict=True), start=1):
            outcome = f"  FAILED ({code})" if code else ""
            left = minutes_left(seconds, len(jobs), at_once)
            print(f"{done}/{len(jobs)}  {name}{outcome}  {left:.0f} min left", flush=True)
            failed += [name] if code else []
    signal.signal(signal.SIGTERM, before)
    return failed


def minutes_left(seconds: Sequence[float], runs: int, jobs: int) -> float:
    """Returns the time until all runs have ended, from the seconds that those which have ended took."""
    return statistics.fmean(seconds) * -(-(runs - len(seconds)) // jobs) / 60


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "", "Folder of all runs and of the report.", flag_values=values)
    flags.DEFINE_integer("seeds", 3, "Seeds of each experiment, from 0 on.", 1, flag_values=values)
    flags.DEFINE_list("rates", [], "Learning rates to try for each experiment, such as 5e-4,1e-3.", flag_values=values)
    flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its share of the CPUs.", 1, flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Print the commands, run none.", flag_values=values)
    flags.DEFINE_string("launcher", "", "Program that trains, instead of python -m jvitmoe.train.", flag_values=values)
