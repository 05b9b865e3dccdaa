"""Compares runs: `python -m jvitmoe.report runs/* [--out runs/report]`.

Runs that differ only in their seed form a group: mean ± sample deviation. `name=runs/a,runs/b` names a group. Prints a
table and writes report.md, comparison.png, curves.png, and runs.json: the config and the results of each group. --html
adds report.html, one page that needs no network. --serve writes nothing: it serves that page on this machine, with runs
that have not ended, and renews it while they go on.
"""

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from jvitmoe import cli
from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.data import datasets
from jvitmoe.errors import UserError, one_line
from jvitmoe.runs import files, history, results, tables
from jvitmoe.runs.console import console

NOTE = (
    "± is the sample deviation over seeds; in a row of one seed, over random paths. A dense run stands before the runs "
    "that differ from it only in `routing` and EMA."
)
OVERVIEW = (
    "Accuracy on the test split. Experts: mean of the expert paths. Barrier: highest rise of the loss on the straight "
    "line from an expert to the mean, nats. Gap: how far the output of the mean expert is from the mean of outputs, "
    "relative, in the worst layer."
)
MANY = 4  # with more groups, the console shows the overview only


class Run(NamedTuple):
    folder: Path
    config: Config
    result: dict[str, Any]


Groups = dict[str, list[Run]]


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError where a folder holds no finished run or a group may not be averaged."""
    values, arguments = cli.parse_with_arguments(argv, _define_flags, arguments="RUN… [GROUP=RUN,RUN…]")
    out = Path(values.out)
    arguments = [argument for argument in arguments if Path(argument).resolve() != out.resolve()]  # it may be in runs/*
    others = [argument for argument in arguments if _is_other_folder(Path(argument))]
    if others and len(others) < len(arguments):
        console.print(f"left out    {', '.join(others)}: no run folder")
        arguments = [argument for argument in arguments if argument not in others]
    if not arguments:
        raise UserError("no run folder was given; name one or more, such as runs/digits_dense runs/digits_random")
    if values.serve:
        _serve(arguments, values.port)
        return
    groups = _read_groups(arguments)
    from jvitmoe.runs import plots  # not above: it imports matplotlib, and --help need not wait for that

    cells = {name: group_rows(name, group) for name, group in groups.items()}
    rows = [row for group in cells.values() for row in group]
    overview = [overview_row(name, group) for name, group in groups.items()]
    files.make_folder(out)
    plots.curves(families(groups), out / "curves.png")
    images = {name: group[0].result["rows"][0]["images"] for name, group in groups.items()}
    plots.comparison({name: by_seed(group) for name, group in groups.items()}, images, out / "comparison.png")
    files.write_text(
        out / "report.md",
        f"# Runs\n\n{opening(groups)}\n\n{tables.markdown(overview)}\n{OVERVIEW}\n\n"
        "![comparison](comparison.png)\n\n![curves](curves.png)\n"
        f"\n## Every model\n\n{tables.markdown(rows)}\n{NOTE}\n",
    )
    files.write_text(out / "runs.json", json.dumps({n: record(group) for n, group in groups.items()}, indent=1) + "\n")
    if values.html:
        files.write_text(out / "report.html", _page(groups))
    short = [{name: cell for name, cell in row.items() if name != "hardware"} for row in rows]
    tables.show(short if len(groups) <= MANY else overview, "test split")
    for hardware in dict.fromkeys(row["hardware"] for row in rows):
        console.print(f"hardware    {hardware}")
    console.print(f"pictures    {out / 'comparison.png'}, {out / 'curves.png'}")
    if values.html:
        console.print(f"page        {out / 'report.html'}")


def _is_other_folder(folder: Path) -> bool:
    """True for a folder that no run wrote, which `runs/*` may hold."""
    return os.path.isdir(folder) and not os.path.exists(folder / files.CONFIG)


def _read_groups(arguments: Sequence[str]) -> Groups:
    """Returns the groups of RUN and GROUP=RUN,RUN arguments, in order."""
    groups: Groups = {}
    runs = []
    for argument in arguments:
        name, members = _members(argument)
        if name:
            _add(groups, name, [read_run(member) for member in members])
        else:
            runs += [read_run(member) for member in members]
    return in_order(group_runs(runs, groups))


def _members(argument: str) -> tuple[str, list[Path]]:
    """Returns (name of the group or "", its run folders) of an argument."""
    name, equals, members = argument.partition("=")
    if equals and not os.path.exists(argument):  # unlike Path.exists, it raises for no name
        return name, [Path(member) for member in members.split(",")]
    return "", [Path(argument)]


def _page(groups: Groups, going: Sequence[Path] = (), stamp: str = "") -> str:
    """Returns the page about groups, and about runs that have not ended; `stamp` as `page.text`."""
    from jvitmoe.runs import page  # not above: it needs the extra `html`

    shown = [
        page.Shown(name, group_rows(name, group), [r.folder for r in group], record(group)["config"], group[0].result)
        for name, group in groups.items()
    ]
    names = [folder.resolve().name for folder in going]
    for folder, name in zip(going, names, strict=True):
        row = _row_so_far(folder, name if names.count(name) == 1 else str(folder))
        shown.append(page.Shown(row["run"], [row], [folder], config_lib.flatten(_read_config(folder)), {}))
    about = [opening(groups)] * bool(groups) + [f"Runs that have not ended: {len(going)}."] * bool(stamp)
    return page.text(" ".join(about), shown, stamp)


def _serve(arguments: Sequence[str], port: int) -> None:
    """Serves the page about the runs that the arguments name."""
    from jvitmoe.runs import serve

    named = [_members(argument) for argument in arguments]
    folders = [folder for _, members in named for folder in members]

    def make(stamp: str) -> str:
        going = [folder for folder in folders if not (folder / files.RESULT).exists()]
        ended = [(name, [str(folder) for folder in members if folder not in going]) for name, members in named]
        groups = _read_groups([f"{name}={','.join(inside)}" if name else inside[0] for name, inside in ended if inside])
        return _page(groups, going, stamp)

    serve.serve(make, folders, port)


def _row_so_far(folder: Path, name: str) -> dict[str, str]:
    """Returns the text cells of a run that has not ended: those of `group_rows`, with its newest figures."""
    lines = history.read_metrics(folder / files.METRICS)
    rates = [line["images_per_second"] for line in lines if line.get("images_per_second")]
    watched = [line for line in lines if line["kind"] != "train"]
    return {
        "run": f"{name} (training)",
        "model": f"at step {max((line['step'] for line in lines), default=0):,}",
        "seeds": "1",
        **dict.fromkeys(results.METRICS, "-"),
        **results.metric_cells(watched[-1] if watched else {}),
        **dict.fromkeys(("parameters", "total", "FLOPs/image"), "-"),
        "images/s": f"{rates[-1]:,.0f}" if rates else "-",
    }


def opening(groups: Groups) -> str:
    """Returns the line that a report opens with: hardware, versions, and the number of seeds of a run."""
    seeds = sorted({len(group) for group in groups.values()})
    made_with = results.made_with([run.result for group in groups.values() for run in group])
    return f"{made_with} n (seeds of a run): {' or '.join(map(str, seeds))}; ± is the sample deviation."


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "runs/report", "Folder for report.md, runs.json and the pictures.", flag_values=values)
    flags.DEFINE_bool("serve", False, "Serve that page while runs go on, and write nothing.", flag_values=values)
    flags.DEFINE_integer("port", 8000, "Of --serve; 0: any that is free.", flag_values=values)
    flags.DEFINE_bool("html", False, "Also write report.html: one page, sortable, with charts.", flag_values=values)


def read_run(folder: Path) -> Run:
    """Returns a run that was tested. Raises UserError where the folder holds none."""
    result = results.read_result(folder)
    if not result:
        raise UserError(f"{str(folder)!r} holds no {files.RESULT}; give a folder whose training has ended")
    return Run(folder, _read_config(folder), result)


def _read_config(folder: Path) -> Config:
    path = folder / files.CONFIG
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; restore it from a copy") from error
    return config_lib.loads(text, str(path))


def group_runs(runs: Sequence[Run], named: Groups | None = None) -> Groups:
    """Returns `named` and the groups of `runs` that differ only in their seed. A group is called what the names of its
    folders share. Raises UserError as `check_group` does, and for two groups of one name."""
    groups, by_config = dict(named or {}), Groups()
    for run in runs:
        by_config.setdefault(_key(run, ("train.seed",)), []).append(run)
    for group in by_config.values():
        _add(groups, _shared_name([run.folder.resolve().name for run in group]), group)
    return groups


def _add(groups: Groups, name: str, group: list[Run]) -> None:
    if name in groups:
        raise UserError(
            f"two groups are called {name!r}, those of {groups[name][0].folder} and {group[0].folder}; "
            f"give one another name, such as other={','.join(str(run.folder) for run in group)}"
        )
    groups[name] = check_group(name, group)


def check_group(name: str, group: list[Run]) -> list[Run]:
    """Returns the group, sorted by seed. Raises UserError where its runs may not be averaged."""
    group = sorted(group, key=lambda run: run.config.train.seed)
    for run, other in itertools.pairwise(group):
        for fault in _faults(run, other):
            raise UserError(f"group {name!r}: {run.folder} and {other.folder} {fault}")
    return group


def _faults(run: Run, other: Run) -> Iterator[str]:
    """Yields why two runs may not be averaged, with the remedy."""
    changed = datasets.differences(run.config, other.config)
    changed.pop("train.seed", None)
    if changed:
        listed = ", ".join(f"{field} ({a!r} and {b!r})" for field, (a, b) in changed.items())
        yield f"differ in {listed}; only seeds may differ"
    if (seed := run.config.train.seed) == other.config.train.seed:
        yield f"are both of seed {seed}; leave one out"
    if (step := run.result["step"]) != other.result["step"]:
        steps = f"{step} and {other.result['step']}"
        yield f"were tested at steps {steps}; run jvitmoe.evaluate on each with the same --checkpoint"
    if _images(run) != _images(other):
        yield "were trained on other images or classes; give each a group of its own"
    if _models(run) != _models(other):
        yield "were tested as different models; run jvitmoe.evaluate on each with the same --paths"


def in_order(groups: Groups) -> Groups:
    """Returns the groups with those that differ only in `routing` and EMA next to each other, dense ones first."""
    matched = {name: _key(group[0], ("train.seed", "train.ema", "routing.")) for name, group in groups.items()}
    keys = list(matched.values())
    names = sorted(groups, key=lambda name: (keys.index(matched[name]), groups[name][0].config.routing.experts > 1))
    return {name: groups[name] for name in names}


def families(groups: Groups) -> list[dict[str, list[Path]]]:
    """Returns {name: folders} of the groups of each kind of routing, in order."""

    def kind(item: tuple[str, list[Run]]) -> tuple[str, str, str]:
        routing = item[1][0].config.routing
        return routing.router, routing.granularity, routing.scope

    every = itertools.groupby(groups.items(), kind)
    return [{name: [run.folder for run in group] for name, group in items} for _, items in every]


def group_rows(name: str, group: Sequence[Run]) -> list[dict[str, str]]:
    """Returns the text cells of a group, one row per model; mean ± sample deviation where there are several seeds."""
    rates = [run.result["images_per_second"] for run in group if run.result.get("images_per_second")]
    hardware = "; ".join(dict.fromkeys(run.result.get("trained_on") or run.result["hardware"] for run in group))
    rows, result = [], group[0].result
    for several in zip(*(run.result["rows"] for run in group), strict=True):
        numbers = dict(several[0])
        for metric in results.METRICS:
            values = [row[metric] for row in several if metric in row]
            if len(values) == len(group) > 1:
                numbers |= {metric: statistics.fmean(values), f"{metric}_std": _deviation(values)}
        rows.append(
            {
                "run": name,
                "model": numbers["model"],
                "seeds": str(len(group)),
                **{**dict.fromkeys(results.METRICS, "-"), **results.metric_cells(numbers)},
                "parameters": f"{numbers.get('parameters', result['active_parameters']):,}",
                "total": f"{result['total_parameters']:,}",
                "FLOPs/image": tables.quantity(numbers["flops_per_image"]) if "flops_per_image" in numbers else "-",
                "images/s": f"{statistics.fmean(rates):,.0f}" if rates else "-",
                "hardware": hardware,
            }
        )
    return rows


def by_seed(group: Sequence[Run]) -> dict[str, list[float]]:
    """Returns model -> accuracy of each seed."""
    seeds = [{row["model"]: row["accuracy"] for row in run.result["rows"]} for run in group]
    return {model: [accuracy[model] for accuracy in seeds] for model in seeds[0]}


def record(group: Sequence[Run]) -> dict[str, Any]:
    """Returns the config of a group and the whole result of each seed."""
    config = {field: value for field, value in config_lib.flatten(group[0].config).items() if field != "train.seed"}
    return {"config": config, "seeds": {run.config.train.seed: run.result for run in group}}


def overview_row(name: str, group: Sequence[Run]) -> dict[str, str]:
    """Returns the text cells of a group in one row: the accuracy of each kind of model, and how mergeable it is."""
    accuracies = by_seed(group)

    def cell(model: str) -> str:
        if model not in accuracies:
            return "-"
        deviation = f" ± {_deviation(accuracies[model]):.2%}" if len(group) > 1 else ""
        return f"{statistics.fmean(accuracies[model]):.2%}{deviation}"

    experts = [statistics.fmean(values) for model, values in accuracies.items() if model.startswith("expert ")]
    why = [run.result["mergeability"] for run in group if "mergeability" in run.result]
    return {
        "run": name,
        "seeds": str(len(group)),
        **{model: cell(model) for model in ("dense", "merged", "EMA", "routed", "ensemble")},
        "experts": f"{statistics.fmean(experts):.2%}" if experts else "-",
        "barrier": f"{statistics.fmean(numbers['barrier']['height'] for numbers in why):.4f}" if why else "-",
        "gap": f"{statistics.fmean(max(numbers['gap']) for numbers in why):.3f}" if why else "-",
    }


def _deviation(values: Sequence[float]) -> float:
    """Returns the sample deviation; nan if a value is not finite, which `statistics` does not accept."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _models(run: Run) -> list[str]:
    return [row["model"] for row in run.result["rows"]]


def _key(run: Run, ignored: tuple[str, ...]) -> str:
    """Returns the config and the data as text, without fields that change no number and those that start with one of
    `ignored`."""
    fields = config_lib.flatten(run.config).items()
    kept = [(k, v) for k, v in fields if k not in config_lib.FREE_ON_RESUME and not k.startswith(ignored)]
    return repr((kept, _images(run)))


def _images(run: Run) -> tuple[tuple[str, ...], dict[str, int] | None]:
    """Returns names of the classes and numbers of images, by which sets of one `data.name` are told apart."""
    return files.read_classes(run.folder), files.read_images(run.folder)


def _shared_name(names: Sequence[str]) -> str:
    """Returns what the names of a group share, without a trailing "_seed" or "-s"; one name alone stays as it is."""
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(names)  # noqa: RUF071 (names, not paths)
    return re.sub(r"[-_. ]+(seed|s)?[-_. ]*\d*$", "", shared) or names[0]


if __name__ == "__main__":
    cli.run(main)
