"""Runs one experiment of the study (docs/study.md) and writes the verdict of every arm.

    python scripts/study.py B --config configs/cifar10_fast.py --seeds 5 --runs runs/study/B --out results/study/B \\
        -- --config.data.dir=DIR

Started again it goes on: see scripts/sweep.py. The arms of A, A_augmented and D are those that were best in A_search
and D_search, whose results must lie beside --out.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sweep import Variant, accuracies, interval, main

from jvitmoe.errors import UserError
from jvitmoe.runs import files, history, tables

Arms = dict[str, Variant]
AUGMENTED = {"data.three_augment": True, "data.cutmix": 1.0, "data.plain_last": 0.1}
PARITY = 0.5  # points: an arm loses nothing if the interval of its difference is above -PARITY
SIZE = {"model.patch": 8, "model.stem": "patch", "train.epochs": 10, "train.eval_every": 10, "train.ema": 0.99}
SIZE |= {"data.validation": 5000}
FEW = {"data.validation": 40_000, "train.batch_size": 512, "train.epochs": 80, "train.eval_every": 80}


def dense(settings: dict[str, object] | None = None) -> Variant:
    return Variant(SIZE | (settings or {}))


def random(granularity: str, rate: float, pull: float, settings: dict[str, object] | None = None) -> Variant:
    routing = {"routing.granularity": granularity, "routing.learning_rate": rate, "routing.pull": pull}
    return Variant(SIZE | routing | (settings or {}), "random")


def epochs(count: int) -> dict[str, object]:
    """Returns the settings of a run that is evaluated at its end."""
    return {"train.epochs": count, "train.eval_every": count}


def parity_search() -> Arms:
    found = {f"dense_rate{rate}": dense(epochs(6) | {"routing.learning_rate": rate}) for rate in (1, 2, 4)}
    grid = itertools.product(("batch", "sample"), (1, 2, 4), (0, 0.01, 0.1, 1))
    return found | {f"{kind}_rate{rate}_pull{pull}": random(kind, rate, pull, epochs(6)) for kind, rate, pull in grid}


def parity(results: Path, settings: dict[str, object] | None = None) -> Arms:
    """Returns dense, its controls, and the best arms of A_search, all trained for longer and with these settings."""
    arms = parity_search()
    samples = [name for name in arms if name.startswith("sample")]
    synchronous = best(results, "A_search", [name for name in samples if name.endswith("pull1")])
    drifting = best(results, "A_search", [name for name in samples if not name.endswith("pull1")])
    batch = best(results, "A_search", [name for name in arms if name.startswith("batch")])
    tuned = best(results, "A_search", [name for name in arms if name.startswith("dense")])
    control = f"dense_{synchronous.split('_')[1]}"
    chosen = dict.fromkeys(("dense_rate1", tuned, control, synchronous, drifting, batch))  # each of them once
    named = {"dense" if name == "dense_rate1" else name: arms[name] for name in chosen}
    changed = epochs(10) | (settings or {})
    return {name: Variant({**arm.settings, **changed}, arm.of_file) for name, arm in named.items()}


def rare_meetings() -> Arms:
    found = {"dense": dense(FEW), "dense_rate2": dense(FEW | {"routing.learning_rate": 2})}
    found["dense_batch128"] = dense(FEW | {"train.batch_size": 128})
    how_often = {"every_step": {}, "every_4": {"routing.pull_every": 4}}
    how_often["qsr"] = {"routing.pull_every": 4, "routing.pull_schedule": "qsr"}
    return found | {name: random("sample", 2, 1, FEW | settings) for name, settings in how_often.items()}


def bytes_against_accuracy() -> Arms:
    found = {"dense": dense()}
    found |= {f"every_{steps}": random("sample", 2, 1, {"routing.pull_every": steps}) for steps in (1, 8, 64, 512)}
    qsr = {"routing.pull_every": 8, "routing.pull_schedule": "qsr"}
    return found | {"qsr": random("sample", 2, 1, qsr)}


def small(count: int) -> dict[str, object]:
    """Returns the settings of a run on 5,000 images."""
    return {"data.validation": 45_000} | epochs(count)


def pretrained() -> Arms:
    first = {"data.name": "hf:data/halves/first", "model.classes": 6} | epochs(20)
    return {"dense": dense(first)}


def fine_tuning_search() -> Arms:
    tuning = {"data.name": "hf:data/halves/second", "model.classes": 4, "data.validation": 17_500}
    tuning |= {"init.source": "runs/study/D_pretrained/dense-seed0", "optim.name": "adamw"}
    adamix = {"routing.granularity": "batch", "routing.scope": "layer", "routing.init": "shared"}
    adamix |= {"routing.experts": 4, "routing.consistency": 1.0}
    r_drop = {"routing.consistency": 0.5, "routing.consistency_loss": "thor", "model.dropout": 0.1}
    found: Arms = {}
    for rate in (3e-3, 1e-3, 3e-4):
        once = tuning | epochs(40) | {"optim.learning_rate": rate}
        found |= {
            f"dense_{rate:g}": dense(once),
            f"dense_80_{rate:g}": dense(once | epochs(80)),
            f"r_drop_{rate:g}": dense(once | r_drop),
            f"adamix_{rate:g}": dense(once | adamix | {"routing.shared_layer": "up"}),
            f"sample_{rate:g}": random("sample", 2, 0.1, once),
        }
        for part, size in (("lora", 8), ("adapter", 64)):
            tuned = once | {f"model.{part}": size}
            found |= {f"{part}_{rate:g}": dense(tuned), f"{part}_80_{rate:g}": dense(tuned | epochs(80))}
            found[f"{part}_adamix_{rate:g}"] = dense(tuned | adamix)
    return found


def fine_tuning(results: Path) -> Arms:
    """Returns every method of D_search at its best rate, the reference first."""
    arms, tries = fine_tuning_search(), dict[str, list[str]]()
    for name in arms:
        tries.setdefault(name.rpartition("_")[0], []).append(name)
    found = {method: arms[best(results, "D_search", names)] for method, names in tries.items()}
    return {"dense_80": found.pop("dense_80"), **found}


def teaching_routes() -> Arms:
    cosub = {"routing.consistency": 0.5, "routing.consistency_loss": "cosub"}
    r_drop = {"routing.consistency": 0.5, "routing.consistency_loss": "thor", "model.dropout": 0.1}
    drops, once = {"model.drop_path": 0.1}, small(80)
    return {
        "dense_160": dense(small(160)),
        "dense": dense(once),
        "dense_drop_path": dense(once | drops),
        "dense_cosub": dense(once | drops | cosub),
        "dense_r_drop": dense(once | r_drop),
        "routes_cosub": random("sample", 2, 0.1, once | cosub),
    }


def ensemble_into_one() -> Arms:
    taught, tied = {"train.distil_last": 0.3}, {"routing.tie_last": 0.3}
    return {
        "dense": dense(small(120)),
        "dense_168": dense(small(168)),
        "dense_taught": dense(small(120) | taught),
        "random_taught": random("sample", 2, 0, small(120) | taught),
        "random_tied": random("sample", 2, 0, small(120) | tied),
    }


# Name -> the arms; the first is what the others are compared with. A search compares by validation accuracy.
EXPERIMENTS: dict[str, Callable[[], Arms]] = {
    "A_search": parity_search,
    "B": rare_meetings,
    "C": bytes_against_accuracy,
    "D_pretrained": pretrained,
    "D_search": fine_tuning_search,
    "E": teaching_routes,
    "F": ensemble_into_one,
}
# Those whose arms follow from the results of a search, in a folder with the results of the study.
AFTER_SEARCH: dict[str, Callable[[Path], Arms]] = {
    "A": parity,
    "A_augmented": lambda results: parity(results, AUGMENTED),
    "D": fine_tuning,
}


def arms_of(experiment: str, results: Path) -> Arms:
    """Returns the arms of an experiment. Raises UserError if the results of its search are not all there."""
    return AFTER_SEARCH[experiment](results) if experiment in AFTER_SEARCH else EXPERIMENTS[experiment]()


def best(results: Path, search: str, names: Sequence[str]) -> str:
    """Returns the arm with the best validation accuracy. Raises UserError if one of the arms has no result."""
    found = validation_accuracies(results / search / "runs", names)
    if missing := set(names) - set(found):
        raise UserError(f"{results / search} has no result of {', '.join(sorted(missing))}; run {search} first")
    return max(found, key=lambda name: found[name])


def validation_accuracies(runs: Path, names: Iterable[str]) -> dict[str, float]:
    """Returns the accuracy of arms on validation images after the last step of seed 0, where there is one."""
    found = {}
    for name in names:
        lines = history.read_metrics(runs / f"{name}-seed0" / files.METRICS)
        if values := [line["accuracy"] for line in lines if line["kind"] == "validation"]:
            found[name] = values[-1]
    return found


def ranking(runs: Path, arms: Iterable[str]) -> list[dict[str, str]]:
    """Returns the text cells of a row per arm of a search, the best first."""
    found = validation_accuracies(runs, arms)
    return [{"arm": name, "validation": f"{found[name]:.2%}"} for name in sorted(found, key=lambda name: -found[name])]


class Compared(NamedTuple):
    """A model of an arm, over seeds; accuracies on the test split in %, differences in points."""

    arm: str
    model: str
    accuracies: list[float]
    paired: list[float]  # minus that of the reference on the same seed; [] for the reference itself


def references(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Returns (arm, model) of what the others are compared with: the dense model of the first arm, its EMA, and the
    controls, dense models whose MLPs have the rate of a random arm."""
    first, *others = arms
    return [(first, "dense"), (first, "EMA"), *((name, "dense") for name in others if name.startswith("dense_rate"))]


Found = dict[str, dict[str, dict[str, float]]]  # arm -> model -> seed -> accuracy on the test split, %


def read(runs: Path, arms: Iterable[str]) -> Found:
    """Returns the accuracies of all arms."""
    return {name: accuracies(runs, name) for name in arms}


def compare(found: Found, reference_arm: str, reference_model: str) -> list[Compared]:
    """Returns the dense, merged and EMA models of all arms, compared with one of them."""
    reference = found[reference_arm].get(reference_model, {})
    compared = []
    for name, models in found.items():
        for model, by_seed in models.items():
            paired = [value - reference[seed] for seed, value in by_seed.items() if seed in reference]
            compared.append(Compared(name, model, [*by_seed.values()], [] if by_seed is reference else paired))
    return compared


def verdicts(runs: Path, arms: Iterable[str]) -> list[dict[str, str]]:
    """Returns the text cells of a row per model and reference: accuracy, mean ± sample deviation; the mean of its
    differences from the reference with their interval; and what follows by the rule of docs/study.md."""
    rows, found = [], read(runs, arms)
    compared = [(reference, item) for reference in references(found) for item in compare(found, *reference)]
    for (against, of), (arm, model, values, paired) in compared:
        if not paired and (against, of) != (arm, model):
            continue  # no seed of the reference
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        row = {"arm": arm, "model": model, "seeds": str(len(values))}
        row |= {"accuracy": f"{statistics.fmean(values):.2f}{deviation}", "minus": f"{against}, {of}" if paired else ""}
        row |= {"difference": "", "verdict": ""}
        if paired:
            row["difference"] = f"{statistics.fmean(paired):+.2f}"
        if len(paired) > 1:
            low, high = interval(paired)
            row["difference"] += f" ({low:+.2f} to {high:+.2f})"
            row["verdict"] = verdict(low, high)
        rows.append(row)
    return rows


def verdict(low: float, high: float) -> str:
    """Returns what follows from an interval."""
    loses_nothing = ", loses nothing" if -PARITY < low <= 0 else ""
    return ("better" if low > 0 else "worse" if high < 0 else "not decided") + loses_nothing


def run() -> None:
    """Runs the command line; see the top of the file."""
    known = sorted([*EXPERIMENTS, *AFTER_SEARCH])
    if sys.argv[1:2] == [] or sys.argv[1] not in known:
        sys.exit(f"the first argument must be one of {', '.join(known)}")
    experiment = sys.argv.pop(1)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path())
    try:
        arms = arms_of(experiment, parser.parse_known_args()[0].out.parent)
    except UserError as error:
        sys.exit(str(error))
    out = main(__doc__, arms)
    with (out / "report.md").open("a") as text:
        rows = ranking if experiment.endswith("_search") else verdicts
        text.write(f"\n## Verdicts\n\n{tables.markdown(rows(out / 'runs', arms))}")


if __name__ == "__main__":
    run()
