"""Trains every router beside dense, several seeds each, and writes one table, its pictures, configs and versions.

    python scripts/compare_routers.py --config configs/digits_dense.py --runs runs/routers --out results/digits
    python scripts/compare_routers.py --config configs/cifar10_small.py --seeds 1 --only dense switch … \
        --runs runs/routers_cifar10 --out results/cifar10_small -- --config.data.dir=DIR

What follows `--` goes to every `jvitmoe.train`. Started again it goes on: finished runs are kept, the others resume.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMA = {"train.ema": 0.99}
FIGURES = ("sample_shared_independent", "sample_shared_shared")  # what averaging breaks, and what it does not
STACK = {"routing.experts": 4}


def variants() -> dict[str, dict[str, object]]:
    """Returns name -> overrides of a dense config."""
    routers = {
        "switch": {"routing.router": "switch"},
        "top2": {"routing.router": "topk", "routing.top_k": 2},
        "expert_choice": {"routing.router": "expert_choice"},
        "soft": {"routing.router": "soft"},
    }
    found = {"dense": {}, "dense_ema": EMA}
    found |= {name: STACK | {"routing.init": "shared"} | settings for name, settings in routers.items()}
    for granularity in ("batch", "sample"):
        for scope in ("shared", "layer"):
            for init in ("shared", "independent"):
                for pull in (0.0, 0.1):
                    name = f"{granularity}_{scope}_{init}" + ("_pull" if pull else "")
                    settings = {"granularity": granularity, "scope": scope, "init": init, "pull": pull}
                    found[name] = STACK | {f"routing.{key}": value for key, value in settings.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a dense experiment")
    parser.add_argument("--runs", type=Path, required=True, help="where the run folders go")
    parser.add_argument("--out", type=Path, required=True, help="where the table goes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", nargs="+", choices=variants(), metavar="VARIANT", help=", ".join(variants()))
    parser.add_argument("arguments", nargs="*", help="after --: flags for every jvitmoe.train")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that a table of all variants can be had after the first third.
    todo = [
        (f"{name}-seed{seed}", settings | {"train.seed": seed})
        for seed in range(options.seeds)
        for name, settings in variants().items()
        if not options.only or name in options.only
    ]
    began, done, failed = time.monotonic(), 0, []

    def run(name: str, settings: dict[str, object]) -> tuple[str, int]:
        workdir = options.runs / name
        if (workdir / "evaluated").exists():
            return name, 0
        overrides = [f"--config.{field}={value}" for field, value in settings.items()]
        train = ["jvitmoe.train", f"--config={options.config}", f"--workdir={workdir}", *overrides, *options.arguments]
        with (options.runs / f"{name}.log").open("a") as log:
            for command in (train, ["jvitmoe.evaluate", f"--workdir={workdir}"]):
                code = subprocess.run([sys.executable, "-m", *command], stdout=log, stderr=log).returncode
                if code:
                    return name, code
        (workdir / "evaluated").touch()
        return name, 0

    with ThreadPoolExecutor(options.jobs) as pool:
        for name, code in pool.map(lambda item: run(*item), todo):
            done += 1
            left = (time.monotonic() - began) / done * (len(todo) - done)
            outcome = f"  FAILED ({code})" if code else ""
            print(f"{done}/{len(todo)}  {name}{outcome}  {left / 60:.0f} min left", flush=True)
            failed += [name] if code else []
    folders = [str(options.runs / name) for name, _ in todo if name not in failed]
    subprocess.run([sys.executable, "-m", "jvitmoe.report", *folders, f"--out={options.out}"], check=True)
    for name in FIGURES:
        if (figure := options.runs / f"{name}-seed0" / "mergeability.png").exists():
            shutil.copy(figure, options.out / f"mergeability_{name}.png")
    with (options.out / "report.md").open("a") as report:
        report.write(
            f"\nWritten by `python {shlex.join(sys.argv)}`, {options.jobs} runs at a time: images/s are those of "
            "a shared machine.\n"
        )
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}; see their logs in {options.runs}")


if __name__ == "__main__":
    main()
