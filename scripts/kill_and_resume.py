"""Shows that a killed run goes on to the same bits: trains uninterrupted, then again with SIGKILL at random moments.

    python scripts/kill_and_resume.py --out runs/killed --kills 2 -- \
        --config configs/digits_random.py --config.train.epochs=20 --config.train.checkpoint_every=5

What follows `--` goes to `jvitmoe.train`. Kills come by turns once a random step was reached, while a checkpoint is
written, during an evaluation, and before the first step. Then the newest checkpoint that both have is compared array by
array (by fingerprints), and the histories line by line.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from jvitmoe.runs import safe_io
from jvitmoe.runs.checkpoint_writer import UNFINISHED
from jvitmoe.runs.checkpoints import Checkpoints, list_steps
from jvitmoe.runs.safe_io import read_metrics

TURNS = ("at a step", "writing a checkpoint", "evaluating", "before the first step")
POLL = 0.002  # seconds
DELAY = 0.05  # at most so many seconds from the moment that was waited for to the kill
TAIL = 4096  # bytes that surely hold the last line of the history


class Run:
    """A run folder, and the process that trains in it now."""

    def __init__(self, workdir: Path, arguments: list[str], evaluations: frozenset[int] = frozenset()) -> None:
        self.workdir, self._arguments, self._evaluations = workdir, arguments, evaluations

    def start(self) -> None:
        settings = (f"--workdir={self.workdir}", "--config.train.log_every=1")
        command = [sys.executable, "-m", "jvitmoe.train", *self._arguments, *settings]
        before = self._history()
        self._before, self._resumed = before and before.st_ino, 0
        self._began, self.startup = time.monotonic(), 0.0
        with self.workdir.with_suffix(".log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self, moment: Callable[[], bool]) -> bool:
        """Returns True once the moment has come, False where the process ended before."""
        while self.process.poll() is None:
            if moment():
                return True
            time.sleep(POLL)
        return False

    def end(self, number: signal.Signals | None = None) -> None:
        """Sends the signal, if any, and returns once the process has ended. Exits where it has failed."""
        if number is not None:
            self.process.send_signal(number)
        if (code := self.process.wait()) not in ((0,) if number is None else (-number, 128 + number)):
            sys.exit(f"training ended with {code}; see {self.workdir.with_suffix('.log')}")

    def trains(self) -> bool:
        """Whether this process has shown a step. Before the first it writes the history anew, as far as it resumes."""
        found = self._history()
        if found is None or found.st_ino == self._before:
            return False
        self._resumed = self._resumed or found.st_size + 1
        if not self.startup and found.st_size >= self._resumed:
            self.startup = time.monotonic() - self._began
        return self.startup > 0

    def reached(self, step: int) -> bool:
        return self.trains() and self.shown() >= step

    def shown(self) -> int:
        """Returns the last step in the history."""
        return self._last().get("step", 0)

    def writes(self) -> bool:
        folder = self.workdir / safe_io.CHECKPOINTS
        return folder.is_dir() and any(UNFINISHED in name for name in os.listdir(folder))

    def evaluates(self) -> bool:
        """Whether the last thing shown is a step that an evaluation follows."""
        last = self._last()
        return last.get("kind") == "train" and last["step"] in self._evaluations

    def checkpoints(self) -> set[int]:
        return set(list_steps(self.workdir / safe_io.CHECKPOINTS))

    def doing(self) -> str:
        """Returns which of TURNS the process was killed in, as the disk tells."""
        moments = (not self.trains(), TURNS[3]), (self.writes(), TURNS[1]), (self.evaluates(), TURNS[2])
        return next((name for holds, name in moments if holds), TURNS[0])

    def _history(self) -> os.stat_result | None:
        path = self.workdir / safe_io.METRICS
        return path.stat() if path.exists() else None

    def _last(self) -> dict[str, Any]:
        """Returns the last whole line of the history; {} where there is none."""
        try:
            with (self.workdir / safe_io.METRICS).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                lines = file.read().split(b"\n")
            return json.loads(lines[-2])
        except (OSError, ValueError, IndexError):
            return {}


def kill(run: Run, turn: str, step: int, startup: float, chance: random.Random) -> None:
    """Kills the run in the given turn, past the step where that is waited for. Exits where it ended before."""
    delay, end = chance.uniform(0, DELAY), time.monotonic() + chance.uniform(0, startup)
    run.start()
    if turn == TURNS[3]:
        # A start may be much faster than the first was, so its first step counts too.
        come = run.wait(lambda: time.monotonic() > end or run.trains())
    elif turn == TURNS[2]:  # a process takes long over its first evaluation only, and not long enough to sleep
        come = run.wait(lambda: run.trains() and run.evaluates())
    else:
        come = run.wait(lambda: run.reached(step)) and (turn == TURNS[0] or run.wait(run.writes))
        time.sleep(delay)
    if not come or run.process.poll() is not None:
        sys.exit(f"the run was over before it could be killed {turn} past step {step}; give it more steps")
    run.end(signal.SIGKILL)


def finish(run: Run) -> None:
    """Trains to the end."""
    run.start()
    run.wait(run.trains)  # notes when the first step is shown
    run.end()


def fingerprint(workdir: Path, number: int) -> dict[str, str]:
    """Returns leaf -> fingerprint, of parameters and optimiser state, of one checkpoint."""
    return Checkpoints(workdir / safe_io.CHECKPOINTS).check(number)["fingerprints"]


def history(workdir: Path, last: int) -> list[dict[str, float]]:
    """Returns the metrics up to a step, without the clock's."""
    lines = read_metrics(workdir / safe_io.METRICS)
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines if line["step"] <= last]


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments at which the run is killed")
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    options.out.mkdir(parents=True)

    uninterrupted = Run(options.out / "uninterrupted", options.arguments)
    finish(uninterrupted)
    print(f"uninterrupted: first step shown {uninterrupted.startup:.1f} s after the start", flush=True)
    lines = read_metrics(uninterrupted.workdir / safe_io.METRICS)
    evaluations = frozenset(line["step"] for line in lines if line["kind"] != "train")
    killed = Run(options.out / "killed", options.arguments, evaluations)

    chance, done = random.Random(options.seed), collections.Counter[str]()
    # The last tenth is room to be hit in.
    reaches = chance.sample(range(2, 2 + lines[-1]["step"] * 9 // 10), options.kills)
    for number, step in enumerate(sorted(reaches)):
        kill(killed, TURNS[number % len(TURNS)], step, uninterrupted.startup, chance)
        done[killed.doing()] += 1
        print(f"killed with SIGKILL {killed.doing()}; the last step shown is {killed.shown()}", flush=True)
    finish(killed)

    last = max(uninterrupted.checkpoints() & killed.checkpoints())
    expected, found = fingerprint(uninterrupted.workdir, last), fingerprint(killed.workdir, last)
    different = [leaf for leaf in expected if found.get(leaf) != expected[leaf]]
    same = history(uninterrupted.workdir, last) == history(killed.workdir, last)
    print(f"{done.total()} kills: " + ", ".join(f"{done[turn]} {turn}" for turn in TURNS))
    print(f"step {last}: {len(different)} of {len(expected)} leaves differ; histories equal: {same}")
    sys.exit(1 if different or not same else 0)


if __name__ == "__main__":
    main()
