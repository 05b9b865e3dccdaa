"""Compares runs: `python -m jvitmoe.report runs/* [--out runs/report]`.

Runs that differ only in their seed form a group: mean ± sample deviation. `name=runs/a,runs/b` names a group. Prints a
table and writes report.md, comparison.png, curves.png, and runs.json: the config and the results of each group. --html
adds report.html, one page that needs no network. --serve writes nothing: it serves that page on this machine, with runs
that have not ended, and renews it while they go on.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jvitmoe import cli
from jvitmoe import config as config_lib
from jvitmoe.errors import UserError
from jvitmoe.runs import files, history, results, tables
from jvitmoe.runs.console import console
from jvitmoe.runs.groups import (
    Groups,
    add_group,
    by_seed,
    families,
    group_rows,
    group_runs,
    in_order,
    opening,
    overview_row,
    read_config,
    read_run,
    record,
)

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
    plots.comparison(
        {name: by_seed([run.result for run in group]) for name, group in groups.items()}, images, out / "comparison.png"
    )
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
            add_group(groups, name, [read_run(member) for member in members])
        else:
            runs += [read_run(member) for member in members]
    return in_order(group_runs(runs, groups))


def _members(argument: str) -> tuple[str, list[Path]]:
    """Returns (name of the group or "", its run folders) of an argument."""
    name, equals, members = argument.partition("=")
    if equals and not os.path.exists(argument):  # unlike Path.exists, it raises for no name
        return name, [Path(member) for member in members.split(",")]
    return "", [Path(argument)]


def _page(groups: Groups, unfinished: Sequence[Path] = (), stamp: str = "") -> str:
    """Returns the page about groups, and about runs that have not ended; `stamp` as `page.text`."""
    from jvitmoe.runs import page  # not above: it needs the extra `html`

    shown = [
        page.GroupOnPage(
            name, group_rows(name, group), [r.folder for r in group], record(group)["config"], group[0].result
        )
        for name, group in groups.items()
    ]
    names = [folder.resolve().name for folder in unfinished]
    for folder, name in zip(unfinished, names, strict=True):
        row = _row_so_far(folder, name if names.count(name) == 1 else str(folder))
        shown.append(page.GroupOnPage(row["run"], [row], [folder], config_lib.flatten(read_config(folder)), {}))
    about = [opening(groups)] * bool(groups) + [f"Runs that have not ended: {len(unfinished)}."] * bool(stamp)
    return page.text(" ".join(about), shown, stamp)


def _serve(arguments: Sequence[str], port: int) -> None:
    """Serves the page about the runs that the arguments name."""
    from jvitmoe.runs import serve

    named = [_members(argument) for argument in arguments]
    folders = [folder for _, members in named for folder in members]

    def make(stamp: str) -> str:
        unfinished = [folder for folder in folders if not (folder / files.RESULT).exists()]
        ended = [(name, [str(folder) for folder in members if folder not in unfinished]) for name, members in named]
        groups = _read_groups([f"{name}={','.join(inside)}" if name else inside[0] for name, inside in ended if inside])
        return _page(groups, unfinished, stamp)

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
        **dict.fromkeys(results.METRIC_FORMATS, "-"),
        **results.metric_cells(watched[-1] if watched else {}),
        **dict.fromkeys(("parameters", "total", "FLOPs/image"), "-"),
        "images/s": f"{rates[-1]:,.0f}" if rates else "-",
    }


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "runs/report", "Folder for report.md, runs.json and the pictures.", flag_values=values)
    flags.DEFINE_bool("serve", False, "Serve that page while runs go on, and write nothing.", flag_values=values)
    flags.DEFINE_integer("port", 8000, "Of --serve; 0: any that is free.", flag_values=values)
    flags.DEFINE_bool("html", False, "Also write report.html: one page, sortable, with charts.", flag_values=values)


if __name__ == "__main__":
    cli.run(main)
