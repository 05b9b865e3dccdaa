"""Runs one experiment of the study (docs/study.md) and writes the verdict of every arm.

    python scripts/study.py A --config configs/cifar10_study.py --seeds 5 --runs runs/study/A --out results/study/A \\
        -- --config.data.dir=DIR

Started again it goes on: see scripts/sweep.py.
"""

import itertools
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from scipy import stats
from sweep import Variant, main

from jvitmoe import report
from jvitmoe.runs import files, tables

Arms = dict[str, Variant]
PARITY = 0.5  # points: an arm loses nothing if the interval of its difference is above -PARITY
STRONG = {"data.three_augment": True, "data.cutmix": 1.0, "data.plain_last": 0.1}


def dense(**settings: object) -> Variant:
    return Variant({name.replace("__", "."): value for name, value in settings.items()})


def random(granularity: str, rate: float, pull: float, **settings: object) -> Variant:
    chosen = {"granularity": granularity, "learning_rate": rate, "pull": pull}
    routing = {f"routing.{name}": value for name, value in chosen.items()}
    return Variant(routing | dict(dense(**settings).settings), "random")


def parity_search() -> Arms:
    """Returns the arms of A's search: one seed, compared on the validation images."""
    found = {f"dense_rate{rate}": dense(routing__learning_rate=rate) for rate in (1, 2, 4)}
    grid = itertools.product(("batch", "sample"), (1, 2, 4), (0, 0.01, 0.1, 1))
    return found | {f"{kind}_rate{rate}_pull{pull}": random(kind, rate, pull) for kind, rate, pull in grid}


# Name -> the arms. The first is what the others are compared with.
EXPERIMENTS: dict[str, Callable[[], Arms]] = {"A_search": parity_search}


def verdicts(runs: Path, arms: Mapping[str, Variant]) -> list[dict[str, str]]:
    """Returns the text cells of a row per model: test accuracy, mean ± sample deviation, and the difference from the
    dense model of the first arm on the same seeds, mean with a 95 % interval (Student's t), in points."""
    first = next(iter(arms))
    found = {name: _accuracies(runs, name) for name in arms}
    reference = found[first].get("dense", {})
    rows = []
    for name, models in found.items():
        for model, by_seed in models.items():
            values = list(by_seed.values())
            paired = [value - reference[seed] for seed, value in by_seed.items() if seed in reference]
            row = {
                "arm": name,
                "model": model,
                "seeds": str(len(values)),
                "accuracy": f"{statistics.fmean(values):.2f}",
            }
            if len(values) > 1:
                row["accuracy"] += f" ± {statistics.stdev(values):.2f}"
            is_reference = (name, model) == (first, "dense")
            rows.append(row | {"difference": "", "verdict": ""} | ({} if is_reference else _difference(paired)))
    return rows


def _difference(paired: list[float]) -> dict[str, str]:
    """Returns the mean of paired differences with its interval, and what follows by the rule of docs/study.md."""
    if len(paired) < 2:
        return {"difference": f"{paired[0]:+.2f}" if paired else "-"}
    mean, error = statistics.fmean(paired), statistics.stdev(paired) / math.sqrt(len(paired))
    half = float(stats.t.ppf(0.975, len(paired) - 1)) * error
    low, high = mean - half, mean + half
    verdict = "better" if low > 0 else "worse" if high < 0 else "not decided"
    verdict += ", loses nothing" if -PARITY < low <= 0 else ""
    return {"difference": f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", "verdict": verdict}


def _accuracies(runs: Path, name: str) -> dict[str, dict[str, float]]:
    """Returns model -> seed -> accuracy on the test split, %, of the models that are one dense ViT."""
    found: dict[str, dict[str, float]] = {}
    for folder in sorted(runs.glob(f"{name}-seed*")):
        if (folder / files.RESULT).exists():
            by_model = report.by_seed([report.read_run(folder)])
            for model in ("dense", "merged", "EMA"):
                if model in by_model:
                    found.setdefault(model, {})[folder.name.rpartition("-")[2]] = 100 * by_model[model][0]
    return found


if __name__ == "__main__":
    experiment = (
        sys.argv.pop(1)
        if sys.argv[1:2] and sys.argv[1] in EXPERIMENTS
        else sys.exit(f"the first argument must be one of {', '.join(EXPERIMENTS)}")
    )
    arms = EXPERIMENTS[experiment]()
    out = main(__doc__, arms)
    with (out / "report.md").open("a") as text:
        text.write(f"\n## Verdicts\n\n{tables.markdown(verdicts(out / 'runs', arms))}")
