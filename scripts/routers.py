"""Compares routers at equal FLOPs: the search of each router's learning rate, and the table (docs/routing.md).

    python scripts/routers.py search --config configs/cifar10_fast.py --seeds 1 --runs runs/routers_search \\
        --out results/routers_search -- --config.data.dir=DIR
    python scripts/routers.py table --config configs/cifar10_fast.py --seeds 5 --runs runs/routers \\
        --out results/routers -- --config.data.dir=DIR

Repeat a command to resume: see scripts/sweep.py. The table takes the rates that were best in the search, whose results
must lie beside --out, on held-out images.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from study import best, dense, epochs, ranking
from sweep import Variant, accuracies, interval, main, mean_cell

from jvitmoe.errors import UserError
from jvitmoe.evaluation import expert_maps
from jvitmoe.runs import figures, files, results
from jvitmoe.runs.console import markdown_table

Arms = dict[str, Variant]
# 64 tokens; a run takes less than 20 minutes of a core.
HIDDEN, LENGTH = 192, 8
SIZE = {"model.patch": 4, "model.stem": "patch", "model.width": 96, "model.heads": 3, "model.hidden": HIDDEN}
SIZE |= {"data.validation": 5000, "train.ema": 0.0}
RATES = (1, 2, 4)  # of MLPs or experts: the tries of every row
REFERENCE = "dense_rate2"


def routers(hidden: int) -> dict[str, dict[str, object]]:
    """Returns the settings of every router beside MLPs of that width, at about the FLOPs of dense: a token has one slot
    of an expert of the dense width, or more slots of narrower ones."""
    one = {"routing.experts": 4, "routing.capacity": 1.0, "routing.eval_capacity": 1.0, "routing.init": "shared"}
    two = one | {"routing.kind": "topk", "routing.top_k": 2, "model.expert_hidden": hidden // 2}
    shared = {"model.expert_hidden": hidden // 3, "model.shared_hidden": hidden // 3}
    random = {"routing.experts": 4, "routing.init": "shared", "routing.pull": 1.0}
    return {
        "switch": one | {"routing.kind": "switch"},
        "top2": two,
        "top2_bias": two | {"routing.balance_loss": 0.0, "routing.balance_bias": 1e-3},
        "top2_shared": two | shared,
        "expert_choice": one | {"routing.kind": "expert_choice"},
        # Mixing tokens into slots and back costs as much as 5/12 of the MLP of the study.
        "soft": one | {"routing.kind": "soft", "model.expert_hidden": hidden * 7 // 12},
        "hash": one | {"routing.kind": "hash"},
        # It ends with all experts for every token, and weighting four outputs costs as well.
        "frozen": one | {"routing.kind": "frozen", "routing.top_k": 2, "model.expert_hidden": hidden // 4 - 2},
        "batch": random | {"routing.kind": "batch"},
        "sample": random | {"routing.kind": "sample"},
        "token": random | {"routing.kind": "token"},
    }


ROUTERS: Mapping[str, Mapping[str, object]] = routers(HIDDEN)


def arm(settings: Mapping[str, object], rate: float, *against: str, length: int = LENGTH) -> Variant:
    return dense({**SIZE, **epochs(length), "optim.mlp_rate": rate, **settings}, *against)


def search() -> Arms:
    found = {f"dense_{rate}": arm({}, rate) for rate in RATES}
    return found | {f"{name}_{rate}": arm(ROUTERS[name], rate) for name, rate in itertools.product(ROUTERS, RATES)}


def table(results_folder: Path, runs: Path) -> Arms:
    """Returns a row per router at its best rate, beside dense; and Switch upcycled from dense at half of its length."""

    def rate(name: str) -> float:
        tried = [f"{name}_{rate}" for rate in RATES]
        return float(best(results_folder, "routers_search", tried).rpartition("_")[2])

    found = {
        "dense": arm({}, 1),
        REFERENCE: arm({}, 2, "dense"),
        "dense_half": arm({}, 2, length=LENGTH // 2),
        "dense_wide": arm({"model.hidden": 4 * HIDDEN}, 2, "dense", REFERENCE),  # the total parameters of Switch
    }
    found |= {name: arm(ROUTERS[name], rate(name), "dense", REFERENCE) for name in ROUTERS}
    half = ROUTERS["switch"] | {"init.source": str(runs / "dense_half-seed0")}
    return found | {"upcycled": arm(half, rate("switch"), "dense", REFERENCE, length=LENGTH // 2)}


def rows(runs: Path, arms: Arms) -> list[dict[str, str]]:
    """Returns the text cells of a row per tested model of an arm."""
    seconds = {name: _seconds(runs, name) for name in arms}
    reference = accuracies(runs, REFERENCE).get("dense", {})
    cells = []
    for name in arms:
        tested = [results.read_result(folder) for folder in sorted(runs.glob(f"{name}-seed*"))]
        for model in [row["model"] for row in tested[0]["rows"]] if tested else ():
            if model not in ("dense", "routed", "merged", "merged, gated"):
                continue
            by_seed = accuracies(runs, name, (model,)).get(model, {})
            paired = [value - reference[seed] for seed, value in by_seed.items() if seed in reference]
            nll = [row["nll"] for result in tested for row in result["rows"] if row["model"] == model]
            difference = f"{statistics.fmean(paired):+.2f}" if paired and name != REFERENCE else "-"
            if len(paired) > 1 and name != REFERENCE:
                difference += " ({:+.2f} to {:+.2f})".format(*interval(paired))
            cells.append(
                {
                    "arm": name,
                    "model": model,
                    "accuracy": mean_cell(list(by_seed.values())),
                    "nll": f"{statistics.fmean(nll):.4f}",
                    f"minus {REFERENCE}": difference,
                    "step time / dense": f"{seconds[name] / seconds['dense']:.2f}" if seconds["dense"] else "-",
                    "total parameters": f"{tested[0]['total_parameters']:,}",
                    "dropped": _dropped(runs, name) if model == "routed" else "-",
                    "agreement": _agreement(tested) if model == "routed" else "-",
                    "seeds": str(len(by_seed)),
                }
            )
    return cells


def _seconds(runs: Path, name: str) -> float:
    """Returns the time of an image in training, the median over seeds; 0 if it is not known."""
    found = [results.read_result(folder).get("images_per_second") for folder in runs.glob(f"{name}-seed*")]
    return 1 / statistics.median(filter(None, found)) if any(found) else 0.0


def _dropped(runs: Path, name: str) -> str:
    """Returns the share of choices that found no slot in the last logged step, the mean over layers and seeds."""
    shares = []
    for folder in runs.glob(f"{name}-seed*"):
        logged = [line for line in files.read_metrics(folder / files.METRICS) if "router/dropped/layer0" in line]
        shares += [value for key, value in logged[-1].items() if key.startswith("router/dropped/")] if logged else []
    return f"{statistics.fmean(shares):.1%}" if shares else "-"


def _agreement(tested: list[dict]) -> str:
    """Returns `expert_maps.agreement` of the same test patches, the mean over layers and pairs of seeds."""
    maps = [np.array(result["routes"]["experts"]) for result in tested]
    pairs = itertools.combinations(maps, 2)
    values = [
        expert_maps.agreement(one.ravel(), other.ravel(), 1 + max(one.max(), other.max()))
        for a, b in pairs
        for one, other in zip(a, b, strict=True)
    ]
    return f"{statistics.fmean(values):.2f}" if values else "-"


@figures.in_style
def picture(cells: list[dict[str, str]]) -> figures.Figure:
    """Returns accuracy against step time."""
    figure, ((axes,),) = figures.subplots(1, 1, (8, 5))
    for cell in cells:
        if cell["step time / dense"] == "-":
            continue
        mean, _, deviation = cell["accuracy"].partition(" ± ")
        at = float(cell["step time / dense"]), float(mean)
        axes.errorbar(*at, yerr=float(deviation or 0), fmt=figures.MARKS.get(cell["model"], "o"), color="black")
        if cell["model"] in ("dense", "routed", "merged"):
            axes.annotate(cell["arm"], at, (5, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="step time / dense", ylabel="test accuracy, %", title="Accuracy against step time, equal FLOPs")
    return figure


def conclusion(runs: Path, arms: Arms) -> str:
    """Returns the end of the report, and draws its figure beside it."""
    cells = rows(runs, arms)
    figures.save(picture(cells), runs.parent / "routers.png")
    return f"\n## Routers\n\n{markdown_table(cells)}\n![accuracy against step time](routers.png)\n"


def run() -> None:
    """Runs the command line; see the top of the file."""
    if sys.argv[1:2] not in (["search"], ["table"]):
        sys.exit("the first argument must be search or table")
    kind, *arguments = sys.argv[1:]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--runs", type=Path, default=Path())
    known = parser.parse_known_args(arguments)[0]
    try:
        arms = search() if kind == "search" else table(known.out.parent, known.runs)
    except UserError as error:
        sys.exit(str(error))
    conclude = ranking if kind == "search" else conclusion
    main(__doc__, arms, evaluate=["--paths=0"], conclusion=partial(conclude, arms=arms), arguments=arguments)


if __name__ == "__main__":
    run()
