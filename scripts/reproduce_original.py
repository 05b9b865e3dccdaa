"""Repeats the original's table on one GPU: dense, Switch and random routing, 100 epochs, three seeds, and their time;
and the table of routers at equal FLOPs (scripts/routers.py) at the original's size.

    python scripts/reproduce_original.py --config configs/cifar10_dense.py --jobs 1 --runs runs/original \\
        --out results/original -- --config.data.dir=DIR
    python scripts/reproduce_original.py time --out results/original

The original kept the model with the lowest loss on the test set; this reports the last checkpoint. With --dry_run it
prints the commands only. Repeat the command to resume: see scripts/sweep.py. The original's rows alone:
--only dense switch random. The step times of all rows come into the table if `time` ran before, on an idle GPU.
"""

import argparse
import statistics
import sys
from pathlib import Path

import archive
import routers
from archive import Runs
from sweep import Variant, accuracies, main, mean_cell, tested_runs

from jvitmoe import config, experiments
from jvitmoe.runs.console import markdown_table

REFERENCE = "dense_rate2"
# Model that is compared, accuracy in %, seconds per 60,000 images on four RTX 8000, as the original reports them.
ORIGINAL = {"dense": ("dense", 71.06, 52.70), "switch": ("routed", 71.1, 71.80), "random": ("merged", 72.18, 131.24)}


def variants() -> dict[str, Variant]:
    """Returns what the experiments of the original's rows change in its dense one, and the rows of the routers."""
    dense = experiments.load("cifar10_dense")
    others = {name: experiments.load(f"cifar10_{name}") for name in ORIGINAL}
    changes = {name: config.differences(dense, other) for name, other in others.items()}
    found = {name: Variant({field: new for field, (_, new) in changed.items()}) for name, changed in changes.items()}
    found[REFERENCE] = Variant({"optim.mlp_rate": 2.0})
    rivals = routers.routers(dense.model.hidden, dense.model.patches + dense.model.has_cls, dense.model.depth)
    for name, settings in rivals.items():
        rate = {"optim.mlp_rate": 4.0} if "routing.pull" in settings else {}  # as the random variants of other files
        found[f"equal_{name}"] = Variant(settings | rate)
    return found


def table(runs: Runs) -> list[dict[str, str]]:
    """Returns the text cells of a row per kind of run: accuracy, mean ± sample deviation, and time, beside what the
    original reports."""
    rows = []
    for name, (model, accuracy, seconds) in ORIGINAL.items():
        tested = [run["result"] for run in tested_runs(runs, name).values()]
        values = list(accuracies(runs, name, (model,)).get(model, {}).values())
        rates = [result["images_per_second"] for result in tested if result.get("images_per_second")]
        rows.append(
            {
                "run": name,
                "model": model,
                "seeds": str(len(values)),
                "accuracy": mean_cell(values),
                "original": f"{accuracy}",
                "s per 60,000 images": f"{60_000 / statistics.fmean(rates):.2f}" if rates else "-",
                "original, four RTX 8000": f"{seconds:.2f}",
            }
        )
    return rows


def conclusion(out: Path) -> str:
    """Returns the end of the report."""
    rivals = markdown_table(routers.rows(out, variants(), REFERENCE))
    return f"\n## Beside the original\n\n{markdown_table(table(archive.kept(out)))}\n## Routers\n\n{rivals}"


def run() -> None:
    """Runs the command line; see the top of the file."""
    if sys.argv[1:2] == ["time"]:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--out", type=Path, required=True)
        return routers.measure("cifar10_dense", variants(), parser.parse_args(sys.argv[2:]).out)
    main(__doc__, variants(), evaluate=["--paths=0"], conclusion=conclusion)


if __name__ == "__main__":
    run()
