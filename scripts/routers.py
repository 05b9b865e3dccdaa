"""Compares routers at equal FLOPs: their search, their step times and the table (docs/routing.md).

    python scripts/routers.py search --config configs/cifar10_fast.py --seeds 1 --runs runs/routers_search \\
        --out results/routers_search -- --config.data.dir=DIR
    python scripts/routers.py time --out results/routers
    python scripts/routers.py table --config configs/cifar10_fast.py --seeds 5 --runs runs/routers \\
        --out results/routers -- --config.data.dir=DIR
    python scripts/routers.py again --config configs/cifar10_fast.py --first_seed 5 --seeds 5 \\
        --runs runs/routers_again --out results/routers_again -- --config.data.dir=DIR

Repeat a command to resume: see scripts/sweep.py. Repeat the search until it has nothing to do: it first searches the
learning rate of dense, which all rows take, then that rate again at the table's length, and then the rate of each row's
MLPs or experts; it adds a rate where the best one is the highest or the lowest. The table takes the rates that were
best in the search, on held-out images. Its --out must lie beside that of the search, routers_search; so must that of
`again`, which repeats the row that is ahead. Run `time` on an idle machine.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import archive
import numpy as np
import timed_step
import verdicts
from archive import Run, Runs
from matplotlib.transforms import Bbox
from sklearn import metrics
from sweep import SEED, Variant, accuracies, config_of, flags_of, main, mean_cell, tested_runs

from jvitmoe.errors import UserError
from jvitmoe.machine import devices, memory, programs
from jvitmoe.reports import figures
from jvitmoe.runs import checkpoints, safe_io
from jvitmoe.runs.console import console, markdown_table, quantity

Arms = dict[str, Variant]
HIDDEN, TOKENS, DEPTH, LENGTH = 192, 64, 4, 8  # a run takes about ten minutes of a core
SIZE = {"model.patch": 4, "model.stem": "patch", "model.width": 64, "model.heads": 2, "model.hidden": HIDDEN}
SIZE |= {"model.depth": DEPTH, "data.validation": 5000, "train.ema": 0.0}
SEARCH = "routers_search"
LEARNING_RATES = (1e-3, 2e-3, 4e-3)  # the first tries of dense, with the MLP rate x 2
LONG = "long_learning_rate"  # the same at the table's length: the best, and half of it
# Of MLPs or experts: the first tries of every row. The mean of experts that are averaged at every step moves by a part
# of their updates.
RATES = (1, 2, 4)
RATES_OF = {"batch": (4, 8, 16), "sample": (2, 4, 8), "token": (2, 4, 8)}
TIMES, ROUNDS = "times.json", 41
WIDE = {"model.hidden": 4 * HIDDEN}  # the total parameters of four experts of the dense width


def routers(hidden: int, tokens: int, layers: int) -> dict[str, dict[str, object]]:
    """Returns the settings of every router beside MLPs of that width, at about the FLOPs of dense: four experts of half
    the width, which may take half of the tokens each. The experts of learned routers start different, as in their
    papers; the balance loss is a mean over layers here and a sum there."""
    four = {"routing.experts": 4}
    even = four | {"routing.capacity": 1.0, "routing.eval_capacity": 1.0}
    spare = four | {"routing.capacity": 2.0, "routing.eval_capacity": 2.0}
    balanced = {"routing.balance_loss": 0.01 * layers}
    half = {"model.expert_hidden": hidden // 2}
    two = even | half | {"routing.kind": "topk", "routing.top_k": 2}
    shared = {"model.expert_hidden": hidden // 3, "model.shared_hidden": hidden // 3}
    slots = 4 * -(-tokens // 4)
    random = {"routing.experts": 4, "routing.init": "shared", "routing.pull": 1.0}
    return {
        "switch": spare | half | balanced | {"routing.kind": "switch"},
        "top2": two | balanced,
        "top2_bias": two | {"routing.balance_loss": 0.0, "routing.balance_bias": 1e-3},
        "top2_shared": two | balanced | shared,
        "expert_choice": spare | half | {"routing.kind": "expert_choice"},
        # Mixing tokens into slots and back costs as much as 9/8 as many hidden units as there are tokens.
        "soft": four | {"routing.kind": "soft", "model.expert_hidden": hidden * tokens // slots - tokens * 9 // 8},
        "hash": four | {"routing.kind": "hash"},
        "batch": random | {"routing.kind": "batch"},
        "sample": random | {"routing.kind": "sample"},
        "token": random | {"routing.kind": "token"},
    }


ROUTERS: Mapping[str, Mapping[str, object]] = {"dense": {}, **routers(HIDDEN, TOKENS, DEPTH)}
# Searched beside Switch: no spare slots, and experts of the dense width.
CAPACITY_1 = {"routing.capacity": 1.0, "routing.eval_capacity": 1.0, "model.expert_hidden": 0}
SEARCHED = {**ROUTERS, "switch_capacity1": {**ROUTERS["switch"], **CAPACITY_1}}


def arm(settings: Mapping[str, object], rate: float = 1, *against: str, length: int = LENGTH) -> Variant:
    epochs = {"train.epochs": length, "train.eval_every": length}  # it is evaluated at its end
    return Variant({**SIZE, **epochs, "optim.mlp_rate": rate, **settings}, against=against)


def validation_accuracies(runs: Runs, names: Iterable[str]) -> dict[str, float]:
    """Returns the accuracy of arms on validation images after the last step of seed 0, where there is one."""
    found = {name: validation_accuracy(runs[f"{name}-seed0"]) for name in names if f"{name}-seed0" in runs}
    return {name: accuracy for name, accuracy in found.items() if accuracy is not None}


def validation_accuracy(run: Run) -> float | None:
    """Returns the accuracy on validation images after the last step; None if the run held none out."""
    values = [line["accuracy"] for line in run["metrics"] if line["kind"] == "validation"]
    return values[-1] if values else None


def ranking(out: Path, arms: Iterable[str]) -> str:
    """Returns the end of a search's report: a row per arm, the best first."""
    found = validation_accuracies(archive.kept(out), arms)
    best_first = sorted(found, key=lambda name: -found[name])
    rows = [{"arm": name, "validation": f"{found[name]:.2%}"} for name in best_first]
    return f"\n## Ranking\n\n{markdown_table(rows)}"


def tries(results_folder: Path, name: str, first: Sequence[float]) -> dict[str, float]:
    """Returns the names of the search's arms NAME_RATE, with their rates: the first ones, and a further one while the
    best of those that have been run is the highest or the lowest."""
    rates = list(first)
    while True:
        arms = {f"{name}_{rate:g}": rate for rate in rates}
        found = validation_accuracies(archive.kept(results_folder / SEARCH), arms)
        if len(found) < len(arms):
            return arms
        winner = arms[max(found, key=lambda name: found[name])]
        if winner == rates[-1]:
            rates.append(2 * winner)
        elif winner == rates[0]:
            rates.insert(0, winner / 2)
        else:
            return arms


def tries_of(results_folder: Path, name: str) -> dict[str, float]:
    """Returns the tries of a row's rate of its MLPs or experts."""
    return tries(results_folder, name, RATES_OF.get(name, RATES))


def chosen(results_folder: Path, arms: Mapping[str, float]) -> float:
    """Returns the best of these rates. Raises UserError if one of them has no result."""
    found = validation_accuracies(archive.kept(results_folder / SEARCH), arms)
    if missing := sorted(arms.keys() - found.keys()):
        raise UserError(f"{results_folder / SEARCH} has no result of {', '.join(missing)}; repeat its search first")
    return arms[max(found, key=lambda name: found[name])]


def long_tries(results_folder: Path) -> dict[str, float]:
    """Returns the tries of dense's learning rate at the table's length. Raises UserError if the shorter ones are not
    done."""
    short = chosen(results_folder, tries(results_folder, "learning_rate", LEARNING_RATES))
    return tries(results_folder, LONG, (short / 2, short))


def learning_rate(results_folder: Path) -> dict[str, object]:
    """Returns the setting of the learning rate that was best for dense. Raises UserError if its search is not done."""
    return {"optim.learning_rate": chosen(results_folder, long_tries(results_folder))}


def search(results_folder: Path) -> Arms:
    def tried(settings: Mapping[str, object], rate: float) -> Variant:
        return arm(settings, rate, length=LENGTH // 2)

    first = tries(results_folder, "learning_rate", LEARNING_RATES)
    found = {name: tried({"optim.learning_rate": rate}, 2) for name, rate in first.items()}
    try:
        found |= {name: arm({"optim.learning_rate": rate}, 2) for name, rate in long_tries(results_folder).items()}
        common = learning_rate(results_folder)
    except UserError:  # an earlier part of the search is not done
        return found
    return found | {
        name: tried({**settings, **common}, rate)
        for row, settings in SEARCHED.items()
        for name, rate in tries_of(results_folder, row).items()
    }


def table(results_folder: Path, runs: Path) -> Arms:
    """Returns a row per router at its best rate beside dense, the reference; and two rows with the settings and rate of
    Switch without spare slots, whose experts start equal: as one draw, and upcycled from dense at half of its length.
    Other rows without a search of their own have the rate of dense."""
    common = learning_rate(results_folder)
    rates = {name: chosen(results_folder, tries_of(results_folder, name)) for name in SEARCHED}
    tuned = rates["dense"]
    reference = "dense" if tuned == 1 else f"dense_rate{tuned:g}"

    def row(settings: Mapping[str, object], rate: float, length: int = LENGTH) -> Variant:
        return arm({**settings, **common}, rate, reference, length=length)

    found = {"dense": row({}, 1)} | {f"dense_rate{rate:g}": row({}, rate) for rate in sorted({2, tuned} - {1})}
    found["dense_half"] = row({}, tuned, LENGTH // 2)
    found["dense_wide"] = row(WIDE, tuned)
    found |= {name: row(ROUTERS[name], rates[name]) for name in ROUTERS if name != "dense"}
    equal, rate = {**SEARCHED["switch_capacity1"], "routing.init": "shared"}, rates["switch_capacity1"]
    source = {"init.source": f"{runs}/dense_half-seed{SEED}"}
    return found | {"switch_equal": row(equal, rate), "upcycled": row({**equal, **source}, rate, LENGTH // 2)}


def again(results_folder: Path) -> Arms:
    """Returns `sample`, the row that is ahead of the reference, and the reference at three learning rates: that of all
    rows, half of it and twice of it."""
    rows = table(results_folder, Path())
    (reference,) = rows["sample"].against
    rate = chosen(results_folder, long_tries(results_folder))
    found = {reference: rows[reference]._replace(against=())}
    for other in (rate / 2, 2 * rate):
        found[f"{reference}_{other:g}"] = Variant({**rows[reference].settings, "optim.learning_rate": other})
    return found | {"sample": rows["sample"]._replace(against=tuple(found))}


def measure(experiment: str, arms: Arms, out: Path) -> None:
    """Writes the step time of every arm of an experiment, relative to its arm dense, and the memory of its step."""
    out.mkdir(parents=True, exist_ok=True)
    configs = {name: config_of(flags_of(experiment, variant)) for name, variant in arms.items()}
    mesh = devices.make_mesh(configs["dense"].train)
    steps = {name: timed_step.TimedStep(config, mesh) for name, config in configs.items()}
    seconds = timed_step.interleave(
        {name: timed.seconds for name, timed in steps.items()},
        ROUNDS,
        lambda number, left: console.print(f"round       {number} of {ROUNDS}, {left:.0f} s left"),
    )
    found = {
        name: {
            "settings": shape(arms[name]),
            "times_dense": timed_step.ratio(seconds[name], seconds["dense"]),
            "seconds": statistics.median(seconds[name]),
            "planned_bytes": programs.planned_bytes(timed.compiled),
        }
        for name, timed in steps.items()
    }
    about = {"rounds": ROUNDS, "hardware": devices.describe(mesh), "versions": checkpoints.versions(), "rows": found}
    safe_io.write_text(out / TIMES, json.dumps(about, indent=1) + "\n")


def shape(variant: Variant) -> dict[str, object]:
    """Returns the settings of an arm on which the time of its step depends."""
    names = {name for name in variant.settings if name.startswith(("model.", "routing."))} - {"routing.init"}
    found: dict[str, object] = json.loads(json.dumps({name: variant.settings[name] for name in names}))  # as in TIMES
    return found


def gone(out: Path, arms: Arms) -> Arms:
    """Returns the arms of a folder's kept runs that can no longer be trained (results/README.md), with their rates and
    the settings that were timed."""
    timed = json.loads(safe_io.read_bytes(out / TIMES) or b'{"rows": {}}')["rows"]
    found: Arms = {}
    for run_name, run in archive.kept(out).items():
        if (name := run_name.rpartition("-seed")[0]) not in arms:
            settings = timed[name]["settings"] if name in timed else {}
            found[name] = Variant({**settings, "optim.mlp_rate": run["config"]["optim"]["mlp_rate"]})
    return found


def rows(out: Path, arms: Arms, reference: str) -> list[dict[str, str]]:
    """Returns the text cells of a row per tested model of an arm, from the kept runs and the times in a folder. What
    belongs to training stands in the first."""
    timed = list(json.loads(safe_io.read_bytes(out / TIMES) or b'{"rows": {}}')["rows"].values())
    runs = archive.kept(out)
    baseline = accuracies(runs, reference).get("dense", {})
    cells = []
    for name, variant in arms.items():
        found = list(tested_runs(runs, name).values())
        tested = [run["result"] for run in found]
        times = next((row for row in timed if row.get("settings") == shape(variant)), None)
        models = [row["model"] for row in tested[0]["rows"]] if tested else []
        for model in models:
            if model not in ("dense", "routed", "merged", "merged, gated"):
                continue
            by_seed, is_first = accuracies(runs, name, (model,)).get(model, {}), model == models[0]
            against = {} if name == reference else baseline
            minus = verdicts.cells([value - against[seed] for seed, value in by_seed.items() if seed in against])
            within = "" if minus["interval"] == "-" else f" ({minus['interval']})"
            of_model = [row for result in tested for row in result["rows"] if row["model"] == model]
            step = times if is_first else None
            cells.append(
                {
                    "arm": name,
                    "model": model,
                    "rate": f"{variant.settings.get('optim.mlp_rate', 1):g}" if is_first else "-",
                    "accuracy": mean_cell(list(by_seed.values())),
                    "nll": f"{statistics.fmean(row['nll'] for row in of_model):.4f}",
                    f"minus {reference}": minus["difference"] + within,
                    "verdict": minus["verdict"],
                    "FLOPs/image": quantity(of_model[0]["flops_per_image"]),
                    "parameters": f"{of_model[0]['parameters']:,}",
                    "total parameters": f"{tested[0]['total_parameters']:,}" if is_first else "-",
                    "step time / dense": "{:.2f} ({:.2f} to {:.2f})".format(*step["times_dense"]) if step else "-",
                    "step's memory": f"{quantity(step['planned_bytes'])}B" if step else "-",
                    "dropped": _dropped(found) if model == "routed" else "-",
                    "agreement": _agreement(tested) if model == "routed" else "-",
                    "seeds": str(len(by_seed)),
                }
            )
    return cells


def _dropped(runs: Sequence[Run]) -> str:
    """Returns the share of choices that found no slot in the last logged step, the mean over layers and seeds."""
    shares = []
    for run in runs:
        logged = [line for line in run["metrics"] if "router/dropped/layer0" in line]
        shares += [value for key, value in logged[-1].items() if key.startswith("router/dropped/")] if logged else []
    return f"{statistics.fmean(shares):.1%}" if shares else "-"


def _agreement(tested: list[dict]) -> str:
    """Returns how far the routers of two seeds part the same test patches in the same way, whatever they call their
    experts: the normalised mutual information of patches that both took, the mean over layers and pairs of seeds."""
    kept = [result["routes"]["experts"] for result in tested]
    maps = [np.array([[text.split() for text in of_layer] for of_layer in layers], int) for layers in kept]
    values = []
    for a, b in itertools.combinations(maps, 2):
        for one, other in zip(a, b, strict=True):
            both = (one >= 0) & (other >= 0)  # -1 where no expert took the patch
            if len(np.unique(one[both])) > 1 < len(np.unique(other[both])):  # else no patches are parted
                values.append(metrics.normalized_mutual_info_score(one[both], other[both]))
    return f"{statistics.fmean(values):.2f}" if values else "-"


def tables(cells: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns a row for each arm, of its first model, and one for each learned router with its merged models, from the
    most accurate arm to the least."""
    by_arm: dict[str, dict[str, dict[str, str]]] = {}
    for cell in cells:
        by_arm.setdefault(cell["arm"], {})[cell["model"]] = cell
    ordered = sorted(by_arm.values(), key=lambda models: -float(next(iter(models.values()))["accuracy"].split()[0]))
    merged = [
        {"arm": models["routed"]["arm"]}
        | {model: cell["accuracy"] for model, cell in models.items()}
        | {"parameters, merged": models["merged"]["parameters"], "seeds": models["routed"]["seeds"]}
        for models in ordered
        if "routed" in models
    ]
    return [next(iter(models.values())) for models in ordered], merged


@figures.in_style
def picture(cells: list[dict[str, str]]) -> figures.Figure:
    """Returns accuracy against step time, of the arms' first models: those that their steps train."""
    timed = [cell for cell in cells if cell["step time / dense"] != "-"]
    figure, ((axes,),) = figures.subplots(1, 1, (10, 6))
    points = []
    for cell in timed:
        mean, _, deviation = cell["accuracy"].partition(" ± ")
        points.append((float(cell["step time / dense"].split()[0]), float(mean)))
        axes.errorbar(*points[-1], yerr=float(deviation or 0), fmt=figures.MARKS[cell["model"]], color="black")
    for model in dict.fromkeys(cell["model"] for cell in timed):
        axes.plot([], [], figures.MARKS[model], color="black", label=model)
    axes.legend(loc="lower right")
    axes.margins(x=0.15)  # for the names at its edges
    axes.set(
        xlabel="time / time of dense, of a step", ylabel="test accuracy, %", title="Equal FLOPs, but for dense_wide"
    )
    figure.draw_without_rendering()  # so that the places of names are those of the final axes
    taken = [Bbox.from_bounds(x, y, 0, 0).padded(6) for x, y in axes.transData.transform(points)]  # the marks
    for cell, at in zip(timed, points, strict=True):
        label = axes.annotate(cell["arm"], at, (0, 0), textcoords="offset points", fontsize=8)
        for y, x in itertools.product((3, -3, 12, -12), (6, -6)):  # points, until it covers no other
            side, height = "left" if x > 0 else "right", "bottom" if y > 0 else "top"
            label.set(position=(x, y), horizontalalignment=side, verticalalignment=height)
            if not label.get_window_extent().count_overlaps(taken):
                break
        taken.append(label.get_window_extent())
    return figure


def draw(results: Path, arms: Arms, out: Path) -> str:
    """Writes the figure of a folder's kept runs to another and returns the tables as markdown."""
    first, merged = tables(rows(results, arms | gone(results, arms), *arms["switch"].against))
    figures.save(picture(first), out / "routers.png")
    return "\n".join(markdown_table(table) for table in (first, merged) if table)


def conclusion(out: Path, arms: Arms) -> str:
    """Returns the end of the report, and draws its figure beside it."""
    text = draw(out, arms, out)
    return f"\n## Routers\n\n{text}\n![accuracy against step time](routers.png)\n"


def run() -> None:
    """Runs the command line; see the top of the file."""
    if sys.argv[1:2] not in (["search"], ["time"], ["table"], ["again"]):
        sys.exit("the first argument must be search, time, table or again")
    kind, *arguments = sys.argv[1:]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--runs", type=Path, default=Path())
    known = parser.parse_known_args(arguments)[0]
    if kind == "time":
        timed = {**SEARCHED, "dense_wide": WIDE}
        return measure("cifar10_fast", {name: arm(settings) for name, settings in timed.items()}, known.out)
    kinds: dict[str, tuple[Callable[[Path], Arms], Callable[..., str]]] = {
        "search": (search, ranking),
        "table": (partial(table, runs=known.runs), conclusion),
        "again": (again, verdicts.conclusion),
    }
    find, conclude = kinds[kind]
    try:
        arms = find(known.out.parent)
    except UserError as error:
        sys.exit(str(error))
    main(__doc__, arms, evaluate=["--paths=0"], conclusion=partial(conclude, arms=arms), arguments=arguments)


if __name__ == "__main__":
    memory.use_huge_pages()
    run()
