"""Runs one experiment of the study (docs/study.md) and writes the verdict of every arm.

    python scripts/study.py B --config configs/cifar10_fast.py --seeds 5 --runs runs/study/B --out results/study/B \\
        -- --config.data.dir=DIR

Repeat the command to resume: see scripts/sweep.py. The arms of A, D, D_adamix, H and H_again are those that
were best in their searches, whose results must lie beside --out.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import archive
import verdicts
from archive import Runs
from sweep import Variant, main, tested_runs

from jvitmoe.errors import UserError
from jvitmoe.runs.console import markdown_table

Arms = dict[str, Variant]
AUGMENTED = {"data.cutmix": 1.0, "data.plain_at_end": 0.1}
# The window of EMA is 500 steps, or 143 steps in B and D: a seventh of most runs. A shorter one would change nothing,
# because the learning rate falls to 0.
SIZE = {"model.patch": 8, "model.stem": "patch", "data.validation": 5000, "train.ema": 0.998}
SHORT = {"train.ema": 0.993}
CONTROLLED = ("dense", "dense_rate2")  # dense, and dense whose MLPs have the learning rate of the random arms


def dense(settings: dict[str, object], *against: str) -> Variant:
    return Variant(SIZE | settings, against=against)


def random(kind: str, rate: float, pull: float, settings: dict[str, object], *against: str) -> Variant:
    routing = {"routing.kind": kind, "optim.mlp_rate": rate, "routing.pull": pull}
    return Variant(SIZE | routing | settings, "random", against)


def epochs(count: int) -> dict[str, object]:
    """Returns the settings of a run that is evaluated at its end."""
    return {"train.epochs": count, "train.eval_every": count}


def mlp_rate(rate: float) -> dict[str, object]:
    return {"optim.mlp_rate": rate}


def parity_search() -> Arms:
    found = {f"dense_rate{rate}": dense(epochs(5) | mlp_rate(rate)) for rate in (1, 2, 4)}
    grid = itertools.product(("batch", "sample"), (1, 2, 4), (0, 0.01, 0.1, 1))
    return found | {f"{kind}_rate{rate}_pull{pull}": random(kind, rate, pull, epochs(5)) for kind, rate, pull in grid}


def token_search() -> Arms:
    grid = itertools.product((1, 2, 4), (0.1, 1))
    return {f"token_rate{rate}_pull{pull}": random("token", rate, pull, epochs(5)) for rate, pull in grid}


def parity(results: Path) -> Arms:
    """Returns dense, its controls, and the best arms of A_search, all trained for longer; with `token`, once its own
    search has been run."""
    arms = parity_search()
    samples = [name for name in arms if name.startswith("sample")]
    synchronous = best(results, "A_search", [name for name in samples if name.endswith("pull1")])
    drifting = best(results, "A_search", [name for name in samples if not name.endswith("pull1")])
    batch = best(results, "A_search", [name for name in arms if name.startswith("batch")])
    tuned = best(results, "A_search", [name for name in arms if name.startswith("dense")])
    controls = dict.fromkeys(("dense_rate1", tuned, f"dense_{synchronous.split('_')[1]}"))  # each of them once
    against = tuple("dense" if name == "dense_rate1" else name for name in controls)
    found = {"dense": Variant(arms["dense_rate1"].settings | epochs(10))}
    found |= {name: Variant(arms[name].settings | epochs(10), against=("dense",)) for name in against[1:]}
    chosen = [synchronous, drifting, batch]
    tokens = token_search()
    if len(validation_accuracies(archive.kept(results / "A_token_search"), tokens)) == len(tokens):
        arms |= tokens
        chosen.append(best(results, "A_token_search", tokens))
    return found | {name: Variant(arms[name].settings | epochs(10), "random", against) for name in chosen}


def parity_again(settings: dict[str, object] | None = None) -> Arms:
    """Returns dense with the MLP rate x 2 and the best `sample` arm of A, at half of A's learning rate, which H_again
    found better for dense."""
    arms, changed = parity_search(), epochs(10) | {"optim.learning_rate": 2e-3} | (settings or {})
    return {
        "dense_rate2": Variant(arms["dense_rate2"].settings | changed),
        "sample_rate4_pull1": Variant(
            arms["sample_rate4_pull1"].settings | changed, "random", against=("dense_rate2",)
        ),
    }


def rare_meetings() -> Arms:
    few = SHORT | {"data.validation": 40_000, "train.batch_size": 512} | epochs(60)
    every_4 = few | {"routing.pull_every": 4}
    references = (*CONTROLLED, "dense_batch128", "dense_batch128_rate2")
    small = few | {"train.batch_size": 128}
    return {
        "dense": dense(few),
        "dense_rate2": dense(few | mlp_rate(2), "dense"),
        "dense_batch128": dense(small, "dense"),
        "dense_batch128_rate2": dense(small | mlp_rate(2), "dense_batch128"),
        "every_step": random("sample", 2, 1, few, *references),
        "every_4": random("sample", 2, 1, every_4, *references, "every_step"),
        "qsr": random("sample", 2, 1, every_4 | {"routing.pull_schedule": "qsr"}, *references, "every_step", "every_4"),
    }


def bytes_against_accuracy() -> Arms:
    # An EMA of the merged model would reduce one expert at every step, so only dense has one.
    once = epochs(7) | {"train.ema": 0.0}
    found = {"dense": dense(epochs(7)), "every_1": random("sample", 2, 1, once, "dense")}
    for name, steps in (("every_2", 2), ("every_8", 8), ("every_64", 64), ("qsr", 8)):
        schedule = {"routing.pull_schedule": "qsr"} if name == "qsr" else {}
        settings = once | schedule | {"routing.pull_every": steps}
        found[name] = random("sample", 2, 1, settings, "dense", "every_1")
    return found


# H: `outer` steps from one mean of the workers to the next, `gpa` averages at every step.
INSIDE = mlp_rate(2) | epochs(7)
OUTER_RATES, OUTER_MOMENTA = (0.5, 0.7, 1.0), (0.4, 0.6, 0.8)


def outer(rate: float, momentum: float) -> dict[str, object]:
    return {"optim.outer_rate": rate, "optim.outer_momentum": momentum}


def workers(part: str, every: int, settings: dict[str, object], *against: str) -> Variant:
    """Returns four experts that own `part` and are averaged every so many steps. They have no EMA, as in C."""
    local = {"routing.part": part, "routing.pull_every": every, "train.ema": 0.0}
    return random("sample", 2, 1, INSIDE | local | settings, *against)


def inside_search() -> Arms:
    found = {"dense_rate2": dense(INSIDE)}
    for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
        found[f"adamw_{rate:g}"] = dense(INSIDE | {"optim.name": "adamw", "optim.learning_rate": rate})
    for every, rate, momentum in itertools.product((10, 30), OUTER_RATES, OUTER_MOMENTA):
        settings = INSIDE | {"routing.pull_every": every} | outer(rate, momentum)
        found[f"outer_{every}_{rate:g}_{momentum:g}"] = dense(settings)
    for decay, share in itertools.product((0.99, 0.9967), (0.7, 0.9)):
        averaging = {"optim.primal_averaging": decay, "optim.primal_share": share}
        found[f"gpa_{decay:g}_{share:g}"] = dense(INSIDE | averaging)
    for rate in (1e-3, 2e-3, 4e-3, 8e-3):
        found[f"local_{rate:g}"] = workers("model", 32, {"optim.learning_rate": rate})
    for rate, momentum in itertools.product(OUTER_RATES[1:], OUTER_MOMENTA):
        found[f"local_outer_{rate:g}_{momentum:g}"] = workers("model", 32, outer(rate, momentum))
    for rate, momentum in itertools.product(OUTER_RATES[1:], OUTER_MOMENTA[:2]):
        found[f"mlp_outer_{rate:g}_{momentum:g}"] = workers("mlp", 8, outer(rate, momentum))
    return found


def inside(results: Path) -> Arms:
    """Returns the best arms of H_search; of workers for every interval, as they were best at one."""
    tried = inside_search()

    def chosen(kind: str, *drop: str) -> dict[str, object]:
        names = [name for name in tried if name.startswith(f"{kind}_") and not name.startswith(drop)]
        settings = dict(tried[best(results, "H_search", names)].settings)
        return {name: settings[name] for name in settings if name.startswith("optim.")}

    adamw, local = chosen("adamw"), chosen("local", "local_outer")
    search = [name for name in tried if name.startswith("outer_")]
    found = {
        "dense": dense(epochs(7)),
        "dense_rate2": dense(INSIDE, "dense"),
        "adamw": dense(INSIDE | adamw, *CONTROLLED, "adamw_rate1"),
        "adamw_rate1": dense(INSIDE | adamw | mlp_rate(1)),
        "outer": Variant(tried[best(results, "H_search", search)].settings, against=CONTROLLED),
        "gpa": dense(INSIDE | chosen("gpa"), *CONTROLLED),
    }
    for part, name, intervals in (("model", "local", (8, 32, 128)), ("mlp", "mlp", (2, 8))):
        plain = local if part == "model" else {}
        for every in intervals:
            found[f"{name}_{every}"] = workers(part, every, plain, *CONTROLLED)
            settings = chosen(f"{name}_outer")
            found[f"{name}_outer_{every}"] = workers(part, every, settings, *CONTROLLED, f"{name}_{every}")
    return found


def outer_again(results: Path) -> Arms:
    """Returns the outer step of H and what it is compared with when it is repeated: the MLP rate x 2 at other learning
    rates, one of them the outer step's own on a constant gradient, rate / (1 - momentum) = 5 / 6 of 4e-3. Because 2e-3
    was better than 4e-3, an outer step at that rate and dense at half of it were added."""
    found, outer = {"dense_rate2": dense(INSIDE)}, inside(results)["outer"].settings
    for rate in (1e-3, 2e-3, 3.3e-3, 8e-3):
        found[f"dense_rate2_{rate:g}"] = dense(INSIDE | {"optim.learning_rate": rate}, "dense_rate2")
    found["outer"] = Variant(outer, against=tuple(found))
    return found | {"outer_0.002": Variant({**outer, "optim.learning_rate": 2e-3}, against=tuple(found))}


def pretrained() -> Arms:
    return {"dense": dense({"data.name": "hf:runs/study/halves/first", "model.classes": 6} | epochs(20))}


TUNING = {
    "data.name": "hf:runs/study/halves/second",
    "model.classes": 4,
    "data.validation": 17_500,
    "init.source": "runs/study/D_pretrained/dense-seed0",
    "optim.name": "adamw",
}


def fine_tuning_search() -> Arms:
    tuning = SHORT | TUNING
    adamix = {"routing.kind": "layer", "routing.init": "shared"}
    adamix |= {"routing.experts": 4, "routing.consistency": 1.0}
    adamix_mlp = adamix | {"routing.part": "up"}  # AdaMix shares the layer that follows the nonlinearity
    dropout = {"model.dropout": 0.1}
    r_drop = dropout | {"routing.consistency": 0.6, "routing.consistency_loss": "thor"}
    longer = ("dense", "dense_80", "dense_dropout_80")
    found: Arms = {}
    for rate in (3e-3, 1e-3, 3e-4):
        once = tuning | epochs(40) | {"optim.learning_rate": rate}
        found |= {
            f"dense_{rate:g}": dense(once, "dense_80"),
            f"dense_rate2_{rate:g}": dense(once | mlp_rate(2), "dense"),
            f"dense_80_{rate:g}": dense(once | epochs(80)),
            f"dense_dropout_80_{rate:g}": dense(once | epochs(80) | dropout, "dense_80"),
            f"r_drop_{rate:g}": dense(once | r_drop, *longer),
            f"adamix_{rate:g}": dense(once | adamix_mlp, *longer, "r_drop"),
            f"sample_{rate:g}": random("sample", 2, 0.1, once, *CONTROLLED),
        }
    for (part, size), rate in itertools.product((("lora", 8), ("adapter", 64)), (1e-2, 3e-3, 1e-3)):
        tuned = tuning | epochs(40) | {"optim.learning_rate": rate, f"model.{part}": size}
        found |= {
            f"{part}_{rate:g}": dense(tuned, "dense"),
            f"{part}_80_{rate:g}": dense(tuned | epochs(80), "dense_80"),
            f"{part}_adamix_{rate:g}": dense(tuned | adamix, part, f"{part}_80"),
        }
    return found


def adamix_search() -> Arms:
    """Returns AdaMix with one matrix of each pair shared and weight decay, as its authors have it, beside one pair."""
    shared = {"routing.kind": "layer", "routing.init": "shared", "routing.part": "up", "routing.experts": 4}
    shared |= {"routing.consistency": 1.0}
    found: Arms = {}
    for (part, size), rate in itertools.product((("lora", 8), ("adapter", 64)), (1e-2, 3e-3, 1e-3)):
        tuned = SHORT | TUNING | epochs(40) | {"optim.weight_decay": 0.1}
        tuned |= {"optim.learning_rate": rate, f"model.{part}": size}
        found[f"{part}_{rate:g}"] = dense(tuned)
        found[f"{part}_adamix_{rate:g}"] = dense(tuned | shared, part)
    return found


def best_rates(results: Path, search: str) -> Arms:
    """Returns every method of a search, METHOD_RATE, at its best rate."""
    arms, tries = EXPERIMENTS[search](results), dict[str, list[str]]()
    for name in arms:
        tries.setdefault(name.rpartition("_")[0], []).append(name)
    return {method: arms[best(results, search, names)] for method, names in tries.items()}


def few_images(count: int) -> dict[str, object]:
    """Returns the settings of a run of that many epochs on 5,000 images."""
    return {"data.validation": 45_000} | epochs(count)


def teaching_routes() -> Arms:
    cosub = {"routing.consistency": 0.5, "routing.consistency_loss": "cosub"}
    twice, drops = few_images(100), {"model.drop_path": 0.3}
    references = (*CONTROLLED, "dense_50")
    return {
        "dense": dense(twice),
        "dense_rate2": dense(twice | mlp_rate(2), "dense"),
        "dense_50": dense(few_images(50), "dense"),
        "dense_drop_path": dense(twice | drops, "dense"),
        "dense_cosub": dense(few_images(50) | drops | cosub, "dense", "dense_50", "dense_drop_path"),
        "routes": random("sample", 2, 0.01, twice, *references),
        "routes_cosub": random("sample", 2, 0.01, few_images(50) | cosub, *references, "routes", "dense_cosub"),
    }


def ensemble_into_one() -> Arms:
    """Returns the arms that the library still has; those that lost are in commit 10447e0 (docs/study.md)."""
    once = few_images(80)
    references = (*CONTROLLED, "dense_112")
    return {
        "dense": dense(once),
        "dense_rate2": dense(once | mlp_rate(2), "dense"),
        "dense_112": dense(few_images(112) | mlp_rate(2), "dense_rate2"),
        "random_free": random("sample", 2, 0, once, *references),
    }


# Name -> the arms, the dense reference first. Those after a search follow from its results, which are in a folder with
# the results of the study; a search compares by validation accuracy.
EXPERIMENTS: dict[str, Callable[[Path], Arms]] = {
    "A_search": lambda _: parity_search(),
    "A_token_search": lambda _: token_search(),
    "A": parity,
    "A_again": lambda _: parity_again(),
    "A_augmented": lambda _: parity_again(AUGMENTED),
    "B": lambda _: rare_meetings(),
    "C": lambda _: bytes_against_accuracy(),
    "D_pretrained": lambda _: pretrained(),
    "D_search": lambda _: fine_tuning_search(),
    "D": partial(best_rates, search="D_search"),
    "D_adamix_search": lambda _: adamix_search(),
    "D_adamix": partial(best_rates, search="D_adamix_search"),
    "E": lambda _: teaching_routes(),
    "F": lambda _: ensemble_into_one(),
    "H_search": lambda _: inside_search(),
    "H": inside,
    "H_again": outer_again,
}


def best(results: Path, search: str, names: Sequence[str]) -> str:
    """Returns the arm with the best validation accuracy. Raises UserError if one of the arms has no result."""
    found = validation_accuracies(archive.kept(results / search), names)
    if missing := set(names) - set(found):
        raise UserError(f"{results / search} has no result of {', '.join(sorted(missing))}; repeat its search first")
    return max(found, key=lambda name: found[name])


def validation_accuracies(runs: Runs, names: Iterable[str]) -> dict[str, float]:
    """Returns the accuracy of arms on validation images after the last step of seed 0, where there is one."""
    found = {}
    for name in names:
        lines = runs[f"{name}-seed0"]["metrics"] if f"{name}-seed0" in runs else ()
        if values := [line["accuracy"] for line in lines if line["kind"] == "validation"]:
            found[name] = values[-1]
    return found


def ranking(out: Path, arms: Iterable[str]) -> str:
    """Returns the end of a search's report: a row per arm, the best first."""
    found = validation_accuracies(archive.kept(out), arms)
    best_first = sorted(found, key=lambda name: -found[name])
    rows = [{"arm": name, "validation": f"{found[name]:.2%}"} for name in best_first]
    return f"\n## Ranking\n\n{markdown_table(rows)}"


def communication(out: Path, arms: Arms) -> str:
    """Returns the end of the report of C and H: the verdicts, and the bytes that a device reduces in a run of each arm,
    until the last logged step."""
    runs = archive.kept(out)
    found = {arm: reduced_bytes(runs, arm) for arm in verdicts.read(runs, arms)}
    most = max(found.values())
    rows = [
        {"arm": arm, "reduced per device, GB": f"{reduced / 1e9:.2f}", "saved": f"{1 - reduced / most:.0%}"}
        for arm, reduced in found.items()
    ]
    return f"{verdicts.conclusion(out, arms)}\n## Communication\n\n{markdown_table(rows)}"


def reduced_bytes(runs: Runs, arm: str) -> int:
    """Returns the bytes that a device reduces in a run of the arm, equal for all seeds; up to the last logged step."""
    lines = next(iter(tested_runs(runs, arm).values()))["metrics"]
    return next(line["reduced_bytes"] for line in reversed(lines) if "reduced_bytes" in line)


def run() -> None:
    """Runs the command line; see the top of the file."""
    if sys.argv[1:2] == [] or sys.argv[1] not in EXPERIMENTS:
        sys.exit(f"the first argument must be one of {', '.join(EXPERIMENTS)}")
    experiment, *arguments = sys.argv[1:]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path())
    try:
        arms = EXPERIMENTS[experiment](parser.parse_known_args(arguments)[0].out.parent)
    except UserError as error:
        sys.exit(str(error))
    is_search = experiment.endswith("_search")
    conclude = communication if experiment in ("C", "H") else ranking if is_search else verdicts.conclusion
    # No verdict needs random paths. A's first runs were tested on some, and a report takes only runs tested alike.
    evaluate = [] if experiment == "A" else ["--paths=0"]
    main(__doc__, arms, evaluate=evaluate, conclusion=partial(conclude, arms=arms), arguments=arguments)


if __name__ == "__main__":
    run()
