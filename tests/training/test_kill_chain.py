"""A run killed at random moments, again and again, is the run that nobody disturbed."""

import os
import re
import subprocess
import sys

import pytest

import processes
from run_folders import assert_same_run, history, tiny, write_experiment

# Keeps the two newest checkpoints and the best, so that kills fall among deletions too.
EXPERIMENT = tiny(
    data={"validation": 800},
    train={"epochs": 45, "batch_size": 16, "eval_every": 3, "checkpoint_every": 150, "ema": 0.9},
)
KILLS = 20


@pytest.mark.long
def test_killed_twenty_times_a_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, tally):
    experiment = write_experiment(tmp_path / "tiny.py", EXPERIMENT)
    script = [sys.executable, "scripts/kill_and_resume.py", f"--out={tmp_path / 'runs'}", f"--kills={KILLS}"]
    done = subprocess.run(
        [*script, "--", f"--config={experiment}"],
        env={**processes.environment(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    survived = re.search(
        r"(\d+) kills: (\d+) at a step, (\d+) writing a checkpoint, (\d+) evaluating, (\d+) before", done.stdout
    )
    total, *by_moment = map(int, survived.groups())
    assert total == KILLS
    assert min(by_moment) >= 1, done.stdout

    uninterrupted, killed = (tmp_path / "runs" / name for name in ("uninterrupted", "killed"))
    assert_same_run(killed, uninterrupted)
    places = [(line["step"], line["kind"]) for line in history(killed)]
    assert len(places) == len(set(places))
    assert [n for n, kind in places if kind == "train"] == list(range(1, places[-1][0] + 1))
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (killed, uninterrupted)]
    assert kept[0] == kept[1]  # nothing is left of killed writes and deletions, and the best is the same
    assert not list(killed.glob("damaged-*"))
    assert os.listdir(killed / "checkpoints")
    tally("kills survived by one run in a row", total)
