"""Classifies pictures: `jvitmoe predict --workdir runs/X IMAGE… [--json] [--top 5]`.

Prints the most probable classes of each file, also of those in folders. Files that cannot be read are reported and
skipped, and the exit code is 1.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np
from absl import flags

from jvitmoe.commands import cli
from jvitmoe.data import pictures
from jvitmoe.data.pictures import DataError
from jvitmoe.errors import UserError, printable
from jvitmoe.runs.console import show_table, warnings_as_lines


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError for a flag or a model that does not fit."""
    values, arguments = cli.parse_with_arguments(argv, _define_flags, arguments="IMAGE or FOLDER…")
    if not values.workdir:
        raise UserError("--workdir is missing; give a run folder, an exported one, or --model=cifar10_cct")
    if not arguments:
        raise UserError("no picture was given; name files or folders after the flags")
    paths, complaints = pictures.find(arguments)
    for message in complaints:
        print(f"skipped: {printable(message)}", file=sys.stderr)
    if not paths:
        sys.exit(1)
    # Not above: these import JAX, and --help need not wait for that.
    from jvitmoe.interop import classifier
    from jvitmoe.machine import compilation

    compilation.use_cache()
    with warnings_as_lines(functools.partial(print, file=sys.stderr)):
        model = classifier.load(values.workdir, values.checkpoint, values.ema)
    for note in model.notes:
        print(f"source      {printable(note)}", file=sys.stderr)
    unreadable: list[str] = []
    classes: list[tuple[Path, list[classifier.Prediction]]] = []
    for start in range(0, len(paths), classifier.BATCH):
        pixels: list[tuple[Path, np.ndarray]] = []
        for path in paths[start : start + classifier.BATCH]:
            try:
                pixels.append((path, model.read(path)))
            except DataError as error:
                unreadable.append(str(error))
        if pixels:
            found = model(np.stack([image for _, image in pixels]), values.top)
            classes += [(path, top) for (path, _), top in zip(pixels, found, strict=True)]
    if values.json:
        listed = [{"file": str(path), "classes": [dataclasses.asdict(c) for c in top]} for path, top in classes]
        print(json.dumps(listed, indent=1))
    elif classes:
        rows = [
            {"image": path} | {str(n): f"{c.name} {c.probability:.1%}" for n, c in enumerate(top, 1)}
            for path, top in classes
        ]
        show_table(rows, f"{values.workdir}: most probable classes")
    for message in unreadable:
        print(f"skipped: {printable(message)}", file=sys.stderr)
    if complaints or unreadable:
        sys.exit(1)


def _define_flags(values: flags.FlagValues) -> None:
    cli.define_model(values)
    flags.DEFINE_integer("top", 5, "Classes per picture.", 1, flag_values=values)
    flags.DEFINE_bool("json", False, "JSON on standard output, instead of a table.", flag_values=values)
    cli.define_weights(values)
