"""Classifies pictures: `python -m jvitmoe.predict --workdir runs/X IMAGE… [--json] [--sheet sheet.png] [--top 5]`.

Prints the most probable classes of each file, also of those in folders. Files that cannot be read are reported and
skipped, and the exit code is 1.
"""

import json
import sys
from pathlib import Path

import numpy as np
from absl import flags

from jvitmoe import cli
from jvitmoe.data import images
from jvitmoe.data.images import DataError
from jvitmoe.errors import UserError, printable
from jvitmoe.interop import classifier, contact_sheet
from jvitmoe.interop.classifier import Prediction
from jvitmoe.runs import tables
from jvitmoe.runs.console import console
from jvitmoe.runtime import compilation


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError for a flag or a model that does not fit."""
    values, arguments = cli.parse_with_arguments(argv, _define_flags)
    compilation.use_cache()
    if not values.workdir:
        raise UserError(
            "--workdir is missing; give a run folder or an exported one, such as --workdir=runs/digits_random"
        )
    if not arguments:
        raise UserError("no picture was given; name files or folders after the flags")
    if values.top < 1:
        raise UserError(f"--top is {values.top}; it must be at least 1")
    out = Path(values.sheet) if values.sheet else None
    if out and (out.suffix.lower() != ".png" or not out.parent.is_dir()):
        raise UserError(f"--sheet is {values.sheet!r}; it must be a .png in a folder that exists")
    model = classifier.load(values.workdir, values.checkpoint)
    files, complaints = images.find(arguments)
    read: list[tuple[Path, np.ndarray]] = []
    for file in files:
        try:
            read.append((file, model.read(file)))
        except DataError as error:
            complaints.append(str(error))
    found = model(np.stack([image for _, image in read]), values.top) if read else []
    rows = [(file, guesses) for (file, _), guesses in zip(read, found, strict=True)]
    if values.json:
        print(json.dumps([_as_json(file, guesses) for file, guesses in rows], indent=1))
    elif rows:
        tables.show([_as_row(file, guesses) for file, guesses in rows], f"{values.workdir}: most probable classes")
    if out and rows:
        contact_sheet.draw(out, [(file, [(g.name, g.probability) for g in guesses]) for file, guesses in rows])
        if not values.json:
            console.print(f"sheet       {printable(str(out))}")
    for complaint in complaints:
        print(f"skipped: {printable(complaint)}", file=sys.stderr)
    if complaints:
        sys.exit(1)


def _as_json(file: Path, guesses: list[Prediction]) -> dict[str, object]:
    classes = [{"label": g.label, "name": g.name, "probability": g.probability} for g in guesses]
    return {"file": str(file), "classes": classes}


def _as_row(file: Path, guesses: list[Prediction]) -> dict[str, str]:
    cells = {str(n): f"{printable(g.name)} {g.probability:.1%}" for n, g in enumerate(guesses, 1)}
    return {"image": printable(str(file)), **cells}


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder, or a folder that jvitmoe.export wrote.", flag_values=values)
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on validation) or a step.", flag_values=values)
    flags.DEFINE_integer("top", 5, "Classes per picture.", flag_values=values)
    flags.DEFINE_bool("json", False, "JSON on standard output, instead of a table.", flag_values=values)
    flags.DEFINE_string("sheet", "", "PNG to draw the pictures in, with the classes below them.", flag_values=values)


if __name__ == "__main__":
    cli.run(main)
