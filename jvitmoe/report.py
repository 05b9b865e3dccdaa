"""Puts runs side by side: `python -m jvitmoe.report runs/* [--out runs/report]`.

Runs that differ in nothing but their seed become one row: mean ± deviation. `name=runs/a,runs/b` names such a group,
and is refused where it is none. Prints one table and writes it as report.md, with its picture in comparison.png, the
curves of all runs in curves.png, and each group's config and versions, and result per seed, in runs.json.
"""

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from jvitmoe import cli
from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.data import datasets
from jvitmoe.errors import UserError, one_line
from jvitmoe.runs import files, plots, results, tables
from jvitmoe.runs.console import console

NOTE = (
    "± is the sample deviation over seeds; in a row of one seed it is over random paths. Each dense run stands before "
    "the runs that differ from it in `routing` and EMA alone."
)
GLANCE = (
    "Accuracy on the test split. Experts: mean of the expert paths. Barrier: highest rise of the loss on the straight "
    "line from an expert to the mean, nats. Gap: how far the output of the mean expert is from the mean of outputs, "
    "relative, in the worst layer."
)
MANY = 4  # groups whose every model fits on a screen


class Run(NamedTuple):
    folder: Path
    config: Config
    result: dict[str, Any]


def main(argv: list[str]) -> None:
    """Writes report.md, runs.json and the pictures and prints the table."""
    values, arguments = cli.parse_with_arguments(argv, _define_flags)
    out = Path(values.out)
    named, folders = _split_names(arguments)
    runs = [read_run(folder) for folder in folders if folder.resolve() != out.resolve()]  # as in runs/*
    groups = {name: check_group(name, [read_run(folder) for folder in members]) for name, members in named.items()}
    for name, group in group_runs(runs).items():
        if name in groups:
            raise UserError(f"two groups are called {name!r}; give one another name, such as other={group[0].folder}")
        groups[name] = group
    if not groups:
        raise UserError("no run folder was given; name one or more, such as runs/digits_dense runs/digits_random")
    rows = [row for name in in_order(groups) for row in group_rows(name, groups[name])]
    out.mkdir(parents=True, exist_ok=True)
    plots.curves(families(groups), out / "curves.png")
    images = next(iter(groups.values()))[0].result["rows"][0]["images"]
    plots.comparison({name: by_seed(groups[name]) for name in in_order(groups)}, images, out / "comparison.png")
    pictures = "![comparison](comparison.png)\n\n![curves](curves.png)\n"
    glance = [glance_row(name, groups[name]) for name in in_order(groups)]
    every = f"## Every model\n\n{tables.markdown(rows)}\n{NOTE}\n"
    files.write_text(out / "report.md", f"# Runs\n\n{tables.markdown(glance)}\n{GLANCE}\n\n{pictures}\n{every}")
    files.write_text(out / "runs.json", json.dumps({n: record(groups[n]) for n in in_order(groups)}, indent=1) + "\n")
    short = [{name: cell for name, cell in row.items() if name != "hardware"} for row in rows]
    tables.show(short if len(groups) <= MANY else glance, "test split")
    for hardware in dict.fromkeys(row["hardware"] for row in rows):
        console.print(f"hardware    {hardware}")
    console.print(f"pictures    {out / 'comparison.png'}, {out / 'curves.png'}")


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "runs/report", "Folder for report.md, runs.json and the pictures.", flag_values=values)


def _split_names(arguments: Iterable[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """Returns the groups named as NAME=DIR,DIR and the other folders."""
    named, folders = {}, []
    for argument in arguments:
        name, equals, members = argument.partition("=")
        if not equals or Path(argument).exists():
            folders.append(Path(argument))
        elif name in named:
            raise UserError(f"two groups are called {name!r}; give one another name")
        else:
            named[name] = [Path(member) for member in members.split(",")]
    return named, folders


def read_run(folder: Path) -> Run:
    """Returns a run whose training has ended. Raises UserError where the folder holds none."""
    result, config = results.read_result(folder), folder / "config.json"
    if not result:
        raise UserError(f"{str(folder)!r} holds no {files.RESULT}; give a folder whose training has ended")
    if not config.is_file():
        raise UserError(f"{str(folder)!r} holds no config.json; give the folder that training wrote")
    try:
        text = config.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{config} cannot be read: {one_line(error)}; restore it from a copy") from error
    return Run(folder, config_lib.loads(text, str(config)), result)


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Returns name -> runs that differ in nothing but their seed, in the order given. The name is what their folders'
    names share. Raises UserError for a seed that a group holds twice, and for two groups of one name."""
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        by_config.setdefault(_key(run, ("train.seed",)), []).append(run)
    groups: dict[str, list[Run]] = {}
    for group in by_config.values():
        name = _shared_name([run.folder.resolve().name for run in group])
        if name in groups:
            raise UserError(
                f"{groups[name][0].folder} and {group[0].folder} are two experiments of one name, {name!r}; "
                f"name them, such as other={','.join(str(run.folder) for run in group)}"
            )
        groups[name] = check_group(name, group)
    return groups


def check_group(name: str, group: list[Run]) -> list[Run]:
    """Returns the group, sorted by seed. Raises UserError where its runs may not be averaged."""
    group = sorted(group, key=lambda run: run.config.train.seed)
    for run, other in itertools.pairwise(group):
        changed = datasets.differences(run.config, other.config)
        changed.pop("train.seed", None)
        if changed:
            listed = ", ".join(f"{field} ({a!r} and {b!r})" for field, (a, b) in changed.items())
            raise UserError(
                f"group {name!r}: {run.folder} and {other.folder} differ in {listed}; only seeds may differ"
            )
        if (seed := run.config.train.seed) == other.config.train.seed:
            raise UserError(f"group {name!r}: {run.folder} and {other.folder} are both of seed {seed}; leave one out")
        if run.result["step"] != other.result["step"]:
            raise UserError(
                f"group {name!r}: {run.folder} was tested at step {run.result['step']} and {other.folder} at "
                f"{other.result['step']}; run jvitmoe.evaluate on each with the same --checkpoint"
            )
        if _models(run) != _models(other):
            raise UserError(
                f"group {name!r}: {run.folder} and {other.folder} were tested as different models; "
                "run jvitmoe.evaluate on each with the same --paths"
            )
    return group


def in_order(groups: dict[str, list[Run]]) -> list[str]:
    """Returns the names with matched groups (equal but for `routing` and the EMA) together, dense ones first."""
    names = list(groups)
    matched = {name: _key(groups[name][0], ("train.seed", "train.ema", "routing.")) for name in names}
    first = {key: place for place, key in reversed(list(enumerate(matched.values())))}
    return sorted(names, key=lambda name: (first[matched[name]], groups[name][0].config.routing.experts > 1))


def families(groups: dict[str, list[Run]]) -> list[dict[str, list[Path]]]:
    """Returns {name: folders} of the groups of each way of routing, in order."""

    def kind(name: str) -> tuple[str, str, str]:
        routing = groups[name][0].config.routing
        return routing.router, routing.granularity, routing.scope

    every = itertools.groupby(in_order(groups), kind)
    return [{name: [run.folder for run in groups[name]] for name in names} for _, names in every]


def group_rows(name: str, group: Sequence[Run]) -> list[dict[str, str]]:
    """Returns the text cells of a group, one row per model; mean ± sample deviation where there are several seeds."""
    rates = [run.result["images_per_second"] for run in group if run.result.get("images_per_second")]
    shared = {
        "images/s": f"{statistics.fmean(rates):,.0f}" if rates else "-",
        "hardware": "; ".join(dict.fromkeys(run.result.get("trained_on") or run.result["hardware"] for run in group)),
    }
    rows = []
    for model, several in zip(_models(group[0]), zip(*(run.result["rows"] for run in group), strict=True), strict=True):
        numbers = dict(several[0])
        for metric in ("accuracy", "nll", "ece"):
            values = [row[metric] for row in several if metric in row]
            if len(group) > 1 and len(values) == len(group):
                numbers |= {metric: statistics.fmean(values), f"{metric}_std": _deviation(values)}
        result = group[0].result
        total = result["total_parameters"]
        rows.append(
            {
                "run": name,
                "model": model,
                "seeds": str(len(group)),
                **{"accuracy": "-", "nll": "-", "ece": "-", **results.metric_cells(numbers)},
                "parameters": f"{numbers.get('parameters', result['active_parameters']):,}",
                "total": f"{total:,}",
                "FLOPs/image": tables.quantity(numbers["flops_per_image"]) if "flops_per_image" in numbers else "-",
                **shared,
            }
        )
    return rows


def by_seed(group: Sequence[Run]) -> dict[str, list[float]]:
    """Returns model -> accuracy of each seed."""
    seeds = [{row["model"]: row["accuracy"] for row in run.result["rows"]} for run in group]
    return {model: [accuracy[model] for accuracy in seeds] for model in seeds[0]}


def accuracies(group: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Returns model -> (mean accuracy, sample deviation over seeds; 0 for one seed)."""
    return {model: (statistics.fmean(x), _deviation(x)) for model, x in by_seed(group).items()}


def record(group: Sequence[Run]) -> dict[str, Any]:
    """Returns what a group's numbers came from: its config, versions, and the whole result of each seed."""
    config = {field: value for field, value in config_lib.flatten(group[0].config).items() if field != "train.seed"}
    return {"config": config, "seeds": {run.config.train.seed: run.result for run in group}}


def glance_row(name: str, group: Sequence[Run]) -> dict[str, str]:
    """Returns the text cells of a group in one row: the accuracy of each kind of model, and how mergeable it was."""

    def cell(model: str, form: str = ".2%") -> str:
        found = accuracies(group).get(model)
        return "-" if found is None else f"{found[0]:{form}}" + (f" ± {found[1]:{form}}" if len(group) > 1 else "")

    experts = [mean for model, (mean, _) in accuracies(group).items() if model.startswith("expert ")]
    why = [run.result["mergeability"] for run in group if "mergeability" in run.result]
    return {
        "run": name,
        "seeds": str(len(group)),
        **{model: cell(model) for model in ("dense", "merged", "EMA", "routed", "ensemble")},
        "experts": f"{statistics.fmean(experts):.2%}" if experts else "-",
        "barrier": f"{statistics.fmean(part['barrier']['height'] for part in why):.4f}" if why else "-",
        "gap": f"{statistics.fmean(max(part['gap']) for part in why):.3f}" if why else "-",
    }


def _deviation(values: Sequence[float]) -> float:
    """Returns the sample deviation, 0 of one value; nan where one is not finite, which `statistics` does not take."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _models(run: Run) -> list[str]:
    return [row["model"] for row in run.result["rows"]]


def _key(run: Run, free: tuple[str, ...]) -> str:
    """Returns the config as text, but for fields that move no number and those that start with one of `free`."""
    fields = config_lib.flatten(run.config).items()
    return repr([(k, v) for k, v in fields if k not in config_lib.FREE_ON_RESUME and not k.startswith(free)])


def _shared_name(names: Sequence[str]) -> str:
    """Returns what the names of a group share, without a trailing "_seed" or "-s"; the name itself where it is one."""
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(names)  # noqa: RUF071 (names, not paths)
    return re.sub(r"[-_. ]+(seed|s)?[-_. ]*\d*$", "", shared) or names[0]


if __name__ == "__main__":
    cli.run(main)
