"""Verdicts, table and picture of the study of averaging, by the rules of docs/study.md, experiment I."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import archive
import numpy as np
from archive import Run, Runs
from sweep import interval, mean_cell
from verdicts import PARITY

from jvitmoe import config as config_lib
from jvitmoe import routing
from jvitmoe.config import Config
from jvitmoe.experts import cost
from jvitmoe.reports import figures
from jvitmoe.runs import safe_io
from jvitmoe.runs.console import markdown_table

Seeds = Mapping[str, float]  # by seed; of accuracies, %
PICTURE = "average.png"
TITLES = {"same": "a start of the same task", "other": "a start of another task"}
BATCHES = {"together_batch512": 512, "together_batch128": 128}
ROUNDS = {"once": 1, "lora": 1, "rounds4": 4, "rounds16": 16}
MIXES = ("alike", "unlike")
MODELS = (  # (title, arm, model); of each mix but for those on all images, and `inside`, whose sites are alike
    ("start", "once", "start"),
    ("best site", "once", "best site"),
    ("the sites, on average", "once", "average site"),
    ("one mean", "once", "mean"),
    ("… of equal weights", "once", "mean, equal"),
    ("… toward the start", "once", "toward start"),
    ("4 rounds", "rounds4", "mean"),
    ("16 rounds", "rounds16", "mean"),
    ("one mean, LoRA", "lora", "mean"),
    ("ensemble of the sites", "once", "ensemble"),
    ("whole models in one run", "inside", "merged"),
    ("together, batch 512", "together_batch512", "dense"),
    ("together, batch 128", "together_batch128", "dense"),
)
MARKS = {"one mean": "o", "4 rounds": "^", "16 rounds": "s", "ensemble of the sites": "D"}  # of those in the picture


class Found:
    """The accuracies on the test set of one kind of start."""

    def __init__(self, runs: Runs, kind: str) -> None:
        self.runs = {name: run for name, run in runs.items() if run["result"]["split"] == "test"}
        self.kind = kind

    def of(self, arm: str) -> dict[str, Run]:
        """Returns the runs of an arm, by seed."""
        prefix = f"{self.kind}-{arm}-seed"
        return {name.removeprefix(prefix): run for name, run in self.runs.items() if name.startswith(prefix)}

    def model(self, arm: str, model: str) -> Seeds:
        """Returns the accuracies of a model of an arm; "best site" is the best of its sites, seed by seed, and
        "average site" the average of their accuracies."""
        found = {}
        for seed, run in self.of(arm).items():
            rows = {row["model"]: 100 * row["accuracy"] for row in run["result"]["rows"]}
            sites = [value for name, value in rows.items() if name.startswith("site ")]
            if sites:
                rows |= {"best site": max(sites), "average site": float(np.mean(sites))}
            found[seed] = rows[model]
        return found

    def together(self) -> Seeds:
        """Returns the better of the two arms that train on everything, by the mean of the test accuracy: the choice
        favours them."""
        return max((self.model(arm, "dense") for arm in BATCHES), key=lambda seeds: float(np.mean([*seeds.values()])))


def minus(one: Seeds, other: Seeds) -> list[float]:
    return [value - other[seed] for seed, value in one.items() if seed in other]


def shown(paired: list[float]) -> str:
    """Returns a difference as text, with its 95 % interval."""
    low, high = interval(paired)
    return f"{np.mean(paired):+.2f} ({low:+.2f} to {high:+.2f})"


def above(paired: list[float], least: float = 0.0) -> bool:
    return interval(paired)[0] > least


def sentences(found: Found, mix: str) -> list[str]:
    """Returns the verdicts of a kind of start and a mix of sites."""
    where = f"From {TITLES[found.kind]}, sites {mix}"
    means = {arm: found.model(f"{arm}_{mix}", "mean") for arm in ("once", "rounds16")}
    site, start = (found.model(f"once_{mix}", name) for name in ("best site", "start"))
    said = []
    for arm, name in (("once", "one mean"), ("rounds16", "16 rounds")):
        differences = minus(means[arm], site), minus(means[arm], start)
        is_useful = all(map(above, differences))
        against = f"{shown(differences[0])} points against the best site, {shown(differences[1])} against the start"
        said.append(f"{where}: averaging is {'' if is_useful else 'not shown to be '}useful with {name}, {against}.")
        if is_useful:
            break
    once, rounds = (minus(means[arm], found.together()) for arm in ("once", "rounds16"))
    equal = "as good as" if above(once, -PARITY) else "not shown to be as good as"
    said.append(f"{where}: one mean is {equal} training together, {shown(once)} points.")
    close = "close" if above(rounds, -PARITY) else "are not shown to close"
    said.append(f"{where}: 16 rounds {close} the gap, {shown(rounds)} points against together.")
    if mix == "alike":
        inside = minus(found.model("inside", "merged"), means["once"])
        said.append(f"{where}: whole models inside one run have {shown(inside)} points against one mean.")
    others = {
        "its sites on average": ("once", "average site"),
        "4 rounds": ("rounds4", "mean"),
        "LoRA": ("lora", "mean"),
    }
    beside = [
        f"{shown(minus(means['once'], found.model(f'{arm}_{mix}', model)))} points against {name}"
        for name, (arm, model) in others.items()
    ]
    said.append(f"{where}, beside the rules: one mean has {', '.join(beside)}.")
    return said


def of_soups(found: Found) -> list[str]:
    """Returns the verdict of the soups."""
    greedy, best, long = (found.model("soups", name) for name in ("greedy", "best", "four times as long"))
    single, longer = minus(greedy, best), minus(greedy, long)
    pays = "Soups pay" if above(single) else "Soups are not shown to pay"
    for_cost = "and pay" if above(single) and above(longer) else "and are not shown to pay"
    return [
        f"{pays}, {shown(single)} points against the best of the four runs, {for_cost} for their cost, "
        f"{shown(longer)} points against one run four times as long."
    ]


def sent(found: Found, arm: str) -> float:
    """Returns the megabytes that a site sends: its weights once per round, or a gradient at every step."""
    run = next(iter(found.of(arm).values()))
    config = config_lib.from_dict(run["config"])
    dense = Config(model=config.model.plain())  # LoRA is folded into it
    size = 4 * cost.tree_size(routing.find(dense).shapes()) / 1e6
    if arm in BATCHES:
        images = sum(next(iter(found.of("once_alike").values()))["result"]["chosen"]["images"])
        return size * config.train.epochs * (images // BATCHES[arm])
    return size * ROUNDS[arm.partition("_")[0]]


def arms(mix: str) -> list[tuple[str, str, str]]:
    """Returns MODELS with the arms of a mix."""
    shared = {*BATCHES, "inside"}
    of_mix = [(title, arm if arm in shared else f"{arm}_{mix}", model) for title, arm, model in MODELS]
    return [one for one in of_mix if one[1] != "inside" or mix == "alike"]


def overview(runs: Runs) -> list[dict[str, str]]:
    """Returns the table of all accuracies: a row per model, and a column per kind of start and mix of sites."""
    columns = {
        f"{kind} task, {mix}": {
            title: mean_cell([*Found(runs, kind).model(arm, model).values()]) for title, arm, model in arms(mix)
        }
        for kind, mix in itertools.product(TITLES, MIXES)
    }
    return [{"model": title} | {name: found.get(title, "-") for name, found in columns.items()} for title, *_ in MODELS]


def rows(found: Found, mix: str) -> list[dict[str, str]]:
    """Returns the table of a kind of start and a mix."""
    site, start = (found.model(f"once_{mix}", name) for name in ("best site", "start"))
    table = []
    for title, arm, model in arms(mix):
        if not (seeds := found.model(arm, model)):
            continue
        runs = [*found.of(arm).values()]
        minutes = np.mean([run["result"]["seconds"] for run in runs]) / 60  # of training and tests
        corrupted = [
            100 * np.mean([*run["result"]["corrupted"][model].values()])
            for run in runs
            if model in run["result"]["corrupted"]
        ]
        table.append(
            {
                "model": title,
                "accuracy, %": mean_cell([*seeds.values()]),
                "minus the start": "" if model == "start" else shown(minus(seeds, start)),
                "minus the best site": "" if model in ("start", "best site") else shown(minus(seeds, site)),
                "minus together": "" if arm in BATCHES else shown(minus(seeds, found.together())),
                "corrupted, %": mean_cell(corrupted) if corrupted else "",
                "a site sends, MB": "" if model in ("start", "merged") else f"{sent(found, arm):,.0f}",
                "minutes of a core": "" if model == "start" else f"{minutes:.1f}",
            }
        )
    return table


@figures.in_style
def picture(runs: Runs) -> figures.Figure:
    """Returns accuracies of start, sites, mean, rounds, ensemble and together, for both kinds, alike and unlike."""
    figure, ((first, second),) = figures.subplots(1, 2, (13, 5))
    for axes, kind in ((first, "same"), (second, "other")):
        found = Found(runs, kind)
        for x, mix in enumerate(MIXES):
            sites = [
                100 * row["accuracy"]
                for run in found.of(f"once_{mix}").values()
                for row in run["result"]["rows"]
                if row["model"].startswith("site ")
            ]
            axes.plot(
                [x - 0.3] * len(sites), sites, "_", color="0.6", markersize=14, label="each site" if not x else None
            )
            for n, (title, arm, model) in enumerate(one for one in arms(mix) if one[0] in MARKS):
                values = [*found.model(arm, model).values()]
                style: Any = {"color": figures.COLOURS[n % len(figures.COLOURS)], "label": title if not x else None}
                axes.errorbar(x - 0.15 + 0.15 * n, np.mean(values), np.std(values, ddof=1), fmt=MARKS[title], **style)
        for title, seeds, style in (
            ("the start", found.model("once_alike", "start"), ":"),
            ("together", found.together(), "--"),
        ):
            axes.axhline(float(np.mean([*seeds.values()])), color="black", linestyle=style, label=title)
        axes.set(title=TITLES[kind].capitalize(), ylabel="test accuracy, %", xlim=(-0.6, 1.6))
        axes.set_xticks([0, 1], ["sites alike", "sites unlike"])
    second.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle("Models that were trained apart, averaged, and trained together", fontsize=11)
    return figure


def tries(runs: Runs) -> list[dict[str, str]]:
    """Returns the table of the search."""
    cells = []
    for name, run in runs.items():
        if run["result"]["split"] != "test":
            one = run["result"]["rows"][0]
            cells.append({"try": name, "accuracy on images held out, %": f"{100 * one['accuracy']:.2f}"})
    return cells


def write(out: Path, command: str) -> None:
    """Writes report.md and its picture beside the archive of a folder."""
    runs = archive.kept(out)
    parts = ["# Averaging of models that were trained apart\n", f"![accuracies]({PICTURE})\n"]
    parts += ["Test accuracy, %: mean ± sample deviation over seeds.\n", markdown_table(overview(runs))]
    for kind in TITLES:
        found = Found(runs, kind)
        for mix in MIXES:
            parts += [f"## {TITLES[kind].capitalize()}, sites {mix}\n", *(f"{one}\n" for one in sentences(found, mix))]
            parts.append(markdown_table(rows(found, mix)))
    if Found(runs, "same").of("soups"):
        parts += ["## Soups\n", *(f"{one}\n" for one in of_soups(Found(runs, "same")))]
    parts += ["## Tries\n", markdown_table(tries(runs)), f"Written by `{command}`.\n"]
    figures.save(picture(runs), out / PICTURE)
    safe_io.write_text(out / "report.md", "\n".join(parts))
