"""Averages models that were trained apart: `jvitmoe average A B --start start --data_dir CHECK --out merged`.

Takes run folders and exports of one start. With labelled pictures it tests the start, every model, their mean and their
ensemble, and says whether the mean may be shipped: report.md, average.png. The result is an export like any other, and
the start of a next round.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jvitmoe.commands import cli, export
from jvitmoe.config import DataConfig
from jvitmoe.errors import UserError, did_you_mean, printable
from jvitmoe.runs.console import console, progress, show_table

WEIGHTS = ("equal", "images", "greedy")
SPLITS = ("test", "train")


@dataclasses.dataclass
class Averaged:
    """The mean of several models."""

    folder: Path  # an export, and the start of a next round if a start was given
    rows: list[dict[str, Any]]  # of each model, the mean and the ensemble, with the numbers of report.md
    verdict: str

    def classifier(self) -> Any:
        """Returns the mean for pictures and arrays (`jvitmoe.load`)."""
        from jvitmoe.interop import classifier

        return classifier.load(self.folder)


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError."""
    cli.end_cleanly()
    values, models = cli.parse_with_arguments(argv, _define_flags, arguments="MODEL MODEL…")
    if not values.out:
        raise UserError("--out is missing; give a new folder, such as --out=merged")
    from jvitmoe.machine import compilation  # not above: it imports JAX

    compilation.use_cache()
    data = DataConfig(name=values.data or "folder", dir=values.data_dir) if values.data_dir or values.data else None
    average(models, Path(values.out), values.start, data, values.split, values.weights, values.toward_start)


def average(
    models: Sequence[Any],
    out: Path | str,
    start: Path | str = "",
    data: DataConfig | Path | str | None = None,
    split: str = "test",
    weights: str = "equal",
    toward_start: float = 0.0,
) -> Averaged:
    """Writes the mean of models that were trained from one start, and what is known of it.

    Args:
        models: runs (`jvitmoe.Run`), folders of runs and of exports in safetensors, and with `start` also files of timm
            and Hugging Face.
        out: a new folder.
        start: their start. Without it nothing is compared with it, and the mean starts no next round.
        data: labelled pictures: a folder of classes, or the `name` and `dir` of a set, whose `split` decides. A half of
            them chooses, for weights="greedy". None tests nothing.
        weights: equal; images, by the number that each model was trained on; greedy, the soup of the best.
        toward_start: the share of the way back to the start, from 0 to 1.

    Raises UserError in one line, before pictures are read, for models that may not be averaged.
    """
    paths, out = [str(getattr(model, "workdir", model)) for model in models], Path(out).expanduser()
    data = DataConfig("folder", str(data)) if isinstance(data, Path | str) else data
    _check(out, start, data, split, weights, toward_start)
    console.print(f"reading     {len(models)} models")
    # Not above: these import JAX and matplotlib, and --help need not wait for that.
    from jvitmoe.data import sources, splits
    from jvitmoe.interop import averaging, load, starts
    from jvitmoe.interop.formats import TARGETS, base

    begin = load.read(start) if start else None
    found, first = averaging.inspect(paths, begin)
    if weights == "images" and (unknown := [model.path for model in found if not model.images]):
        raise UserError(f"{unknown[0]} does not say how many images it was trained on; set --weights=equal")
    with cli.naming_plugin(Path(paths[0])):
        pictures: Any = averaging.find_pictures(data, split, first) if data else None
    if weights == "greedy" and len(pictures) < 2:
        raise UserError("--weights is 'greedy', which needs two pictures or more; give more, or other weights")
    chosen = found
    with progress("averaging and testing" if pictures else "averaging") as batch_done:
        if weights == "greedy":
            pictures, held = sources.hold_out(pictures, len(pictures) // 2)
            chosen = averaging.greedy(found, averaging.Scorer(first, held, batch_done))
        counts = [model.images if weights == "images" else 1 for model in chosen]
        mean = averaging.mean(chosen, counts, begin, toward_start)
        measured = averaging.measure(found, mean, begin, first, pictures, batch_done)
    weight = {model: count / sum(counts) for model, count in zip(chosen, counts, strict=True)}
    rows = averaging.cells(measured.rows, {model.name: share for model, share in weight.items()})
    show_table(rows, "Models")
    console.print(measured.verdict)
    source, target = _source(out, mean, first, begin, weight, measured.verdict), TARGETS["safetensors"]
    images = splits.some(pictures, base.SAMPLE) if pictures else base.noise(first.model)
    export.write(out, target, source, target.sample(source, images), others=_report(measured, rows, first.classes))
    console.print(f"written     {printable(str(out))}, hash {starts.digest(source)}")
    return Averaged(out, measured.rows, measured.verdict)


def _source(out: Path, mean: Any, first: Any, begin: Any, weight: Mapping[Any, float], verdict: str) -> Any:
    """Returns what is exported (`load.Source`): the mean, with what it was made of."""
    from jvitmoe.interop import load

    made_of = [{"model": model.name, "hash": model.digest, "weight": share} for model, share in weight.items()]
    about: Any = {"averaged": {"of": made_of, "verdict": verdict}}
    if begin and begin.kind == load.OURS:  # settings of a run name folders of this machine
        about["config"] = begin.config
    about |= {"crop": first.crop, "mean": first.mean, "std": first.std}
    return load.Source(out, load.OURS, mean, first.model, first.classes, **about)


def _report(measured: Any, rows: Sequence[Mapping[str, str]], classes: Sequence[str]) -> dict[str, bytes]:
    """Returns the files that tell what is known of a mean (`averaging.Measured`)."""
    from jvitmoe.interop import averaging
    from jvitmoe.reports import figures, page, run_figures

    parts: list[page.Part] = [page.Heading(1, "Mean of models"), measured.verdict, rows, averaging.NOTE]
    drawn = {}
    if measured.losses:  # there were pictures
        parts.insert(2, page.Picture("average"))
        drawn["average.png"] = figures.png(run_figures.average(measured, classes))
    return drawn | {"report.md": page.as_markdown(parts).encode()}


def _check(
    out: Path, start: str | Path, data: DataConfig | None, split: str, weights: str, toward_start: float
) -> None:
    """Raises UserError for a folder that is not new, and arguments that need others, or have no such value."""
    export.check_new(out)
    if weights not in WEIGHTS or split not in SPLITS:
        name, value, known = ("weights", weights, WEIGHTS) if weights not in WEIGHTS else ("split", split, SPLITS)
        raise UserError(f"--{name} is {value!r}; it must be one of {', '.join(known)}{did_you_mean(value, known)}")
    if weights == "greedy" and not data:
        raise UserError("--weights is 'greedy', which chooses on labelled pictures; give --data_dir")
    if not 0 <= toward_start <= 1:
        raise UserError(f"--toward_start is {toward_start}; it must be from 0 (the mean) to 1 (the start)")
    if toward_start and not start:
        raise UserError(f"--toward_start is {toward_start}, which needs the start; give --start")


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "", "New folder to write to.", flag_values=values)
    flags.DEFINE_string("start", "", "Folder of jvitmoe start that the models were trained from.", flag_values=values)
    where = "Labelled pictures to test on: a folder of classes, or where the set of --data is."
    flags.DEFINE_string("data_dir", "", where, flag_values=values)
    flags.DEFINE_string("data", "", "Their set, if it is no folder: a data.name.", flag_values=values)
    flags.DEFINE_string("split", "test", "Which split of the set: test or train.", flag_values=values)
    about = "equal; images, by the number each was trained on; greedy, the best by half of the pictures."
    flags.DEFINE_string("weights", "equal", about, flag_values=values)
    flags.DEFINE_float("toward_start", 0.0, "Share of the way back to the start, 0 to 1.", flag_values=values)
    cli.define_plugin(values)
