"""Shows that a killed run goes on to the same bits: trains undisturbed, then again with SIGKILL at random steps.

    python scripts/kill_and_resume.py --out runs/killed --steps 20 --kills 2 -- \
        --config configs/cifar10_random.py --config.train.batch_size=8 --config.train.checkpoint_every=5

What follows `--` goes to `jvitmoe.train`. Both runs are stopped with SIGTERM once --steps is reached; then the newest
checkpoint that both have is compared leaf by leaf (CRC-32 of parameters and optimiser state), and the histories line by
line.
"""

import argparse
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import logging

from jvitmoe import tracking
from jvitmoe.checkpoint import Checkpoints


def run_until(workdir: Path, arguments: list[str], reach: int, number: signal.Signals) -> float:
    """Trains until step `reach` is in the history, then sends the signal. Returns seconds until the first new line."""
    began, first = time.monotonic(), 0.0
    known = len(tracking.read_metrics(workdir / tracking.METRICS))
    with workdir.with_suffix(".log").open("a") as log:
        settings = (f"--workdir={workdir}", "--config.train.log_every=1", "--config.train.keep=1000")
        command = [sys.executable, "-m", "jvitmoe.train", *arguments, *settings]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            lines = tracking.read_metrics(workdir / tracking.METRICS)
            if len(lines) > known and not first:
                first = time.monotonic() - began
            if first and lines[-1]["step"] >= reach:
                process.send_signal(number)
                process.wait()
            time.sleep(0.01)
    if process.returncode not in (-number, 128 + number):
        sys.exit(f"training ended with {process.returncode}; see {log.name}")
    return first


def checksums(workdir: Path, number: int) -> dict[str, str]:
    """Returns leaf -> CRC-32, parameters and optimiser state, of one checkpoint."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    meta = checkpoints.read_meta(number)
    checkpoints.close()
    return {f"{item}{leaf}": value for item, leaves in meta["checksums"].items() for leaf, value in leaves.items()}


def history(workdir: Path, last: int) -> list[dict[str, float]]:
    """Returns the metrics up to a step, without the clock's."""
    lines = tracking.read_metrics(workdir / tracking.METRICS)
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines if line["step"] <= last]


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="chooses the steps at which the run is killed")
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    undisturbed, killed = options.out / "undisturbed", options.out / "killed"

    first = run_until(undisturbed, options.arguments, options.steps, signal.SIGTERM)
    print(f"undisturbed: first step shown {first:.1f} s after the start", flush=True)
    for reach in sorted(random.Random(options.seed).sample(range(2, options.steps), options.kills)):
        run_until(killed, options.arguments, reach, signal.SIGKILL)
        print(f"killed with SIGKILL once step {reach} was shown", flush=True)
    run_until(killed, options.arguments, options.steps, signal.SIGTERM)

    saved = [
        {int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()} for run in (undisturbed, killed)
    ]
    last = max(saved[0] & saved[1])
    expected, found = checksums(undisturbed, last), checksums(killed, last)
    different = [leaf for leaf in expected if found.get(leaf) != expected[leaf]]
    same = history(undisturbed, last) == history(killed, last)
    print("loss by step: " + " ".join(f"{line['loss']:.4f}" for line in history(killed, last)))
    print(f"step {last}: {len(different)} of {len(expected)} leaves differ; histories equal: {same}")
    sys.exit(1 if different or not same else 0)


if __name__ == "__main__":
    main()
