"""Packs kept runs into one file, a line per run, gives their files back byte for byte, and lists them.

    python scripts/archive.py pack RUNS_DIR… --out FILE       # RUNS_DIR has a folder per run
    python scripts/archive.py unpack FILE --out RUNS_DIR
    python scripts/archive.py list FILE… [--csv]              # a row per tested model; a single expert has none

results/README.md has the layout of a line. Equal runs in equal order give equal bytes.
"""

import argparse
import csv
import functools
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jvitmoe.errors import UserError, one_line
from jvitmoe.reports.results import METRIC_FORMATS, metric_cells, trained_on
from jvitmoe.runs import safe_io
from jvitmoe.runs.console import markdown_table

FILE = "runs.jsonl.gz"  # in the folder of an experiment
Run = dict[str, Any]  # what a report reads of it: "config", "result" and, if its history was kept, "metrics"
Runs = Mapping[str, Run]  # by name, in the order of a report


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _one_a_line(values: Iterable[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


# Part of a run -> its file, how the file is read, and how its text is made again.
PARTS: Mapping[str, tuple[str, Callable[[str], Any], Callable[[Any], str]]] = {
    "config": (safe_io.CONFIG, json.loads, _indented),
    "result": (safe_io.RESULT, json.loads, _indented),
    "metrics": (safe_io.METRICS, _lines, _one_a_line),
}
MEASURED = ("accuracy", "nll", "ece", "images", "parameters", "flops_per_image")  # columns of the flat file
OF_RUN = ("step", "images_per_second", "hardware")


def read(path: Path) -> Runs:
    """Returns the runs of an archive, which must not be changed. Raises UserError where it is none."""
    if (packed := safe_io.read_bytes(path)) is None:
        raise UserError(f"there is no {path}; give an archive, such as results/study/A/{FILE}")
    try:
        return _parsed(packed)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no archive of runs: {one_line(error)}; restore it from a copy") from error


@functools.lru_cache(maxsize=4)  # the arms of a table ask for the same file many times
def _parsed(packed: bytes) -> Runs:
    runs = {line.pop("name"): line for line in _lines(gzip.decompress(packed).decode())}
    if not runs:
        raise ValueError("it has no run")
    if others := [name for name in runs if Path(name).name != name]:  # it becomes a folder
        raise ValueError(f"{others[0]!r} is no name of a run")
    return runs


def kept(folder: Path) -> Runs:
    """Returns the runs that the folder of an experiment keeps; none if it has no archive yet."""
    return read(folder / FILE) if (folder / FILE).exists() else {}


def write(path: Path, runs: Runs) -> None:
    """Writes an archive, whole or not at all."""
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:  # no name and no time in the header
        file.write(_one_a_line({"name": name, **run} for name, run in runs.items()).encode())
    safe_io.write_bytes(path, packed.getvalue())


def of_folder(folder: Path) -> Run:
    """Returns the run in a folder. Raises UserError where it has no config or result, or its values would not give back
    the bytes of a file."""
    run = {}
    for part, (file, parse, text) in PARTS.items():
        if (content := safe_io.read_bytes(folder / file)) is None:
            if part == "metrics":  # not every report needs a history
                continue
            raise UserError(f"{folder} has no {file}; give folders of runs that were tested")
        try:
            run[part] = parse(content.decode())
        except ValueError as error:
            raise UserError(f"{folder / file} is no JSON: {one_line(error)}; restore it from a copy") from error
        if text(run[part]).encode() != content:
            raise UserError(f"{folder / file} is not as jvitmoe writes it, so its bytes would be lost; keep the file")
    return run


def unpack(runs: Runs, out: Path) -> list[Path]:
    """Writes the files of runs into folders of their names, and returns the folders."""
    for name, run in runs.items():
        safe_io.make_folder(out / name)
        for part, (file, _, text) in PARTS.items():
            if part in run:
                safe_io.write_text(out / name / file, text(run[part]))
    return [out / name for name in runs]


def pack(folders: Iterable[Path]) -> Runs:
    """Returns the tested runs in folders of run folders, by name. Raises UserError where a folder has none, or two have
    one name, or as `of_folder` does."""
    runs: dict[str, Run] = {}
    for folder in folders:
        found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{safe_io.RESULT}"))}
        if not found:
            raise UserError(f"{folder} holds no run that was tested; give a folder of run folders, such as runs")
        if twice := sorted(runs.keys() & found):
            raise UserError(f"two runs are called {twice[0]}; give one of them another name")
        runs |= {name: of_folder(path) for name, path in found.items()}
    return runs


def model_rows(run: Run) -> list[dict[str, Any]]:
    """Returns the rows of the models that were tested, without single experts."""
    return [row for row in run["result"]["rows"] if not row["model"].startswith("expert ")]


def table(archives: Mapping[Path, Runs]) -> str:
    """Returns a table of all tested models as text."""
    cells = [
        {
            "run": f"{path.parent}/{name}",
            "model": row["model"],
            **dict.fromkeys(METRIC_FORMATS, "-"),
            **metric_cells(row),
        }
        for path, runs in archives.items()
        for name, run in runs.items()
        for row in model_rows(run)
    ]
    return markdown_table(cells)


def flat(archives: Mapping[Path, Runs]) -> str:
    """Returns a CSV file of all tested models: what was measured, and the settings that differ between any two runs."""
    every = [(path, name, run) for path, runs in archives.items() for name, run in runs.items()]
    settings = [
        {f"{section}.{field}": value for section, fields in run["config"].items() for field, value in fields.items()}
        for _, _, run in every
    ]
    names = dict.fromkeys(name for found in settings for name in found)
    differ = [name for name in names if len({repr(found.get(name)) for found in settings}) > 1]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["folder", "run", "model", *MEASURED, *OF_RUN, *differ])
    for (path, name, run), found in zip(every, settings, strict=True):
        of_run = run["result"] | {"hardware": trained_on(run["result"])}
        about = [of_run.get(field, "") for field in OF_RUN] + [found.get(field, "") for field in differ]
        for row in model_rows(run):
            writer.writerow([path.parent, name, row["model"], *(row.get(field, "") for field in MEASURED), *about])
    return out.getvalue()


def main() -> None:
    """Runs the command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write an archive of the runs in folders")
    packing.add_argument("folders", nargs="+", type=Path, metavar="RUNS_DIR")
    packing.add_argument("--out", type=Path, required=True, metavar="FILE")
    unpacking = commands.add_parser("unpack", help="write the files of an archive's runs")
    unpacking.add_argument("archive", type=Path, metavar="FILE")
    unpacking.add_argument("--out", type=Path, required=True, metavar="RUNS_DIR")
    listing = commands.add_parser("list", help="print a table of the tested models")
    listing.add_argument("archives", nargs="+", type=Path, metavar="FILE")
    listing.add_argument("--csv", action="store_true", help="with all that was measured, and the settings that differ")
    options = parser.parse_args()
    try:
        if options.command == "pack":
            write(options.out, pack(options.folders))
        elif options.command == "unpack":
            unpack(read(options.archive), options.out)
        else:
            found = {path: read(path) for path in options.archives}
            print(flat(found) if options.csv else table(found), end="")
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
