"""Compares runs: `jvitmoe report runs/* [--out runs/report]`.

Runs that differ only in their seed form a group: mean ± sample deviation. Prints a table and writes
report.md, comparison.png, curves.png, and runs.json: the config and the results of each group. --html adds report.html,
one page that needs no network. A folder that is no tested run is left out, with its reason.
"""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jvitmoe.commands import cli
from jvitmoe.errors import UserError, escaped
from jvitmoe.reports import comparison, page, results
from jvitmoe.reports.comparison import Groups
from jvitmoe.runs import safe_io
from jvitmoe.runs.console import console, show_table

NOTE = (
    "± is the sample deviation over seeds; in a row of one seed, over random paths. A dense run stands before the runs "
    "that differ from it only in `routing`, `optim.mlp_rate` and EMA."
)
OVERVIEW = (
    "Experts: mean of the expert paths. Barrier: highest rise of the loss on the straight "
    "line from an expert to the mean, nats. Gap: how far the output of the mean expert is from the mean of outputs, "
    "relative, in the worst layer. Steps took: the time of training's steps, without evaluation, of the first seed."
)
MANY = 4  # with more groups, the console shows the overview only; with more differences, the others stand below it


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError where no folder holds a tested run."""
    values, arguments = cli.parse_with_arguments(argv, _define_flags, arguments="RUN…")
    report(arguments, Path(values.out), values.html, shlex.join(argv[1:]))


def report(runs: Sequence[str], out: Path, html: bool = False, command: str = "") -> None:
    """Writes the report of run folders into a folder. `html` adds one page with all figures; `command` is what the
    report says after `jvitmoe report`. Raises UserError as `main`."""
    if os.path.exists(out / safe_io.CONFIG):  # unlike Path.exists, it raises for no name
        raise UserError(f"--out is {str(out)!r}, which is a run folder; give a folder for the report")
    ours = os.path.realpath(out)  # it may be in runs/*
    found = _read_groups([each for each in runs if os.path.realpath(each) != ours])
    rows = comparison.with_data(found, [r for n, group in found.items() for r in comparison.group_rows(n, group)])
    overview = comparison.overview(found)
    pictures = _pictures(found)
    unfinished, differences = comparison.unfinished(found), comparison.differences(found)
    said = escaped(f"Command: jvitmoe report {command or shlex.join([f'--out={out}', *runs])}")
    explained = [*[comparison.DECIDED] * bool(differences), OVERVIEW, comparison.opening(found), said]
    parts: list[page.Part] = [page.Heading(1, "Runs"), *differences[:MANY], comparison.tested(found), *unfinished]
    parts += [
        *pictures,
        overview,
        *differences[MANY:],
        page.Notes(explained),
        page.Heading(2, "Every model"),
        rows,
        page.Notes([NOTE]),
    ]
    safe_io.make_folder(out)
    for picture in pictures:
        safe_io.write_bytes(out / f"{picture.name}.png", picture.png)
    safe_io.write_text(out / "report.md", page.as_markdown(parts))
    records = {name: comparison.record(group) for name, group in found.items()}
    safe_io.write_text(out / "runs.json", json.dumps(records, indent=1) + "\n")
    if html:
        safe_io.write_text(out / "report.html", page.as_html([*parts, *_details(found)]))
    short = [{name: row[name] for name in row if name != "hardware"} for row in rows]
    table = comparison.without_empty(short) if len(found) <= MANY else overview
    show_table(table, "test split", str(out / "report.md"))
    for hardware in dict.fromkeys(row["hardware"] for row in rows):
        console.print(f"hardware    {hardware}")
    console.print(f"pictures    {', '.join(str(out / f'{picture.name}.png') for picture in pictures)}")
    if html:
        console.print(f"page        {out / 'report.html'}")
    for line in [*unfinished, *differences[:MANY]]:
        console.print(line)


def _read_groups(arguments: Sequence[str]) -> Groups:
    """Returns the groups of run folders, in order; prints which folders are left out, and why. Raises UserError where
    none is left."""
    runs, left_out = [], []
    for argument in arguments:
        try:
            runs.append(comparison.read_run(safe_io.run_folder(argument)))
        except UserError as error:
            left_out.append(error)
    if not runs:
        nothing = UserError("no run folder was given; name one or more, such as runs/digits_dense runs/digits_random")
        raise left_out[0] if left_out else nothing
    for reason in left_out:
        console.print(f"left out    {reason}")
    return comparison.in_order(comparison.group_runs(runs))


def _pictures(found: Groups) -> list[page.Picture]:
    """Returns the figures of all groups."""
    from jvitmoe.reports import figures  # not above: it imports matplotlib, and --help need not wait for that

    images = {name: group[0].result["rows"][0]["images"] for name, group in found.items()}
    table = {name: comparison.by_seed([run.result for run in group]) for name, group in found.items()}
    ranked = comparison.of_one_set(found)
    pictures = [figures.picture("comparison", figures.comparison(table, images, ranked))]
    if curves := figures.curves({name: [run.folder for run in group] for name, group in found.items()}, ranked):
        pictures.append(figures.picture("curves", curves))
    return pictures


def _details(found: Groups) -> list[page.Part]:
    """Returns what only the page has: the settings in which groups differ, and the figures of each group's first
    seed."""
    from jvitmoe.reports import figures, run_figures

    parts: list[page.Part] = []
    if len((rows := comparison.setting_rows(found))[0]) > 1:
        parts += [page.Heading(2, "Settings that differ"), rows]
    for name, (run, *_) in found.items():
        with comparison.naming_result(run.folder):
            drawn = run_figures.of_run(run.result, run.folder)
            pictures = [figures.picture(Path(file).stem, figure) for file, figure in drawn.items()]
        own = (page.own_picture(run.folder / file, title) for file, title in run_figures.TITLES.items())
        pictures += filter(None, own)
        if pictures:
            parts += [page.Heading(2, f"{name}, seed {run.config.train.seed}"), *pictures]
        for row in run.result["rows"]:
            if confusion := row.get("confusion"):
                names = results.class_names(run.folder, len(confusion))
                parts += [page.Heading(2, f"{name}, classes, {row['model']}"), results.class_rows(confusion, names)]
    return parts


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "runs/report", "Folder for report.md, runs.json and the pictures.", flag_values=values)
    flags.DEFINE_bool("html", False, "Also write report.html: one page with all figures.", flag_values=values)
