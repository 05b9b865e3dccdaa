"""What a run writes for people and programs: the console, `metrics.jsonl`, TensorBoard, the tables.

Lines of `metrics.jsonl` carry `step` (updates done) and `kind` (train, validation or test); a number that is not
finite is null. A resumed run drops the lines past the step it restored, so each step stands there once.
"""

import contextlib
import json
import math
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jvitmoe.config import UserError, checksum, one_line

METRICS = "metrics.jsonl"
PART = ".part"  # of a file that is being written
RESULT = "result.json"
CLASSES = "classes.json"
IMAGES = "images.json"
MERGEABILITY = "mergeability.png"
LEFT = ("run", "model", "hardware", "image")  # columns of words
PLAIN_SECONDS = 2.0  # least time between two progress lines in a file
SHOW_SECONDS = 20.0  # longest time without progress shown, but for a step, an evaluation or a save that takes longer
LEAST_BAR, WIDEST_BAR = 10, 40  # columns of a terminal

console = Console(highlight=False, markup=False, soft_wrap=True)  # names of files and classes are nobody's markup


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Prints a RuntimeWarning from inside as a line of its own, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, RuntimeWarning):
                    console.print(f"warning: {warning.message}")


def own(workdir: Path) -> None:
    """Raises UserError where something in the run folder is a link: writing to it would write to another place, which
    whoever made the folder chose."""
    try:
        links = [path for path in workdir.iterdir() if path.is_symlink()]
    except OSError as error:
        raise UserError(f"workdir {str(workdir)!r} cannot be listed: {error.strerror}; let it be read") from error
    if links:
        raise UserError(
            f"{links[0]} is a link, and what is written to it would lie elsewhere; put its target in its place"
        )


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, through a power cut as well. Raises UserError where it cannot be written."""
    part = path.with_name(path.name + PART)
    try:
        part.unlink(missing_ok=True)
        with part.open("x") as file:  # never through a link that somebody has put there
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise _unwritten(path, error) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file, each step and kind once, without damaged ones. Raises UserError where the
    file cannot be read."""
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    try:
        texts = path.read_text(errors="replace").split("\n")
    except FileNotFoundError:
        texts = []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; let it be read") from error
    for text in texts:
        try:
            line = json.loads(text)
            step, kind = line["step"], line["kind"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if type(step) is int and isinstance(kind, str):
            lines.setdefault((step, kind), line)
    return list(lines.values())


def checksums(workdir: Path, step: int) -> dict[str, str]:
    """Returns name -> CRC-32 of the history up to a step, and of the files that are written once."""
    texts = {name: (workdir / name).read_bytes() for name in (CLASSES, IMAGES) if (workdir / name).is_file()}
    if (workdir / METRICS).exists():
        texts[METRICS] = _history(workdir, step).encode()
    return {name: f"{zlib.crc32(text):08x}" for name, text in texts.items()}


def _history(workdir: Path, step: int) -> str:
    lines = [line for line in read_metrics(workdir / METRICS) if line["step"] <= step]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written: {error.strerror}; make room or let it be written, and give the same command again"
    )


class ProgressLine:
    """The progress of a run on a terminal, drawn several times a second: as many of its parts as fit in one line, first
    ones first, then the time elapsed and a bar."""

    def __init__(self, parts: list[str], done: int, total: int) -> None:
        self.parts, self.done, self._total = parts, done, total
        self._began = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        parts = [*self.parts, f"{_duration(time.monotonic() - self._began)} elapsed"]
        while len(text := "  ".join(parts)) > options.max_width and len(parts) > 1:
            parts.pop()
        room = min(options.max_width - len(text) - 2, WIDEST_BAR)
        bar = [ProgressBar(total=self._total, completed=self.done, width=room)] if room >= LEAST_BAR else []
        row = Table.grid(padding=(0, 2))
        row.add_row(text, *bar)
        yield row


class Tracker:
    """The open log of one run; a context manager.

    Args:
        workdir: the run folder, which exists; None writes nothing, for processes beside the first.
        start, total: steps done and steps to do.
        batch_size: images per step, for images/s.
    """

    def __init__(self, workdir: Path | None, start: int, total: int, batch_size: int) -> None:
        self._file, self._tensorboard = None, None
        self._checksums: dict[str, str] = {}
        if workdir and (start < total or (workdir / METRICS).exists()):  # a finished run does not make an empty file
            path = workdir / METRICS
            write_text(path, _history(workdir, start))
            self._path, self._checksums = path, checksums(workdir, start)
            try:
                (workdir / "tb").mkdir(exist_ok=True)
                self._file = path.open("a")
                # Written from here: the thread of SummaryWriter dies of a full disk and lets everybody wait for it.
                self._tensorboard = EventsWriter(str(workdir / "tb" / "events"))
                self._tensorboard.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
            except OSError as error:
                raise _unwritten(path, error) from error
        self._total, self._batch = total, batch_size
        self._clock: tuple[int, float] | None = None  # step and time that the rate counts from
        self._first_seconds = 0.0  # of the step before the clock started
        self._shown = self._printed = -math.inf  # when a step was last shown, and printed
        self._line = ProgressLine(["compiling"], start, total)
        self._live = Live(self._line, console=console) if console.is_terminal else None

    def __enter__(self) -> "Tracker":
        if self._live:
            self._live.start()
            console.show_cursor(True)  # rich hides it, and a process that is killed could not show it again
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        with contextlib.suppress(OSError):  # the disk is full: what could not be written has been said already
            if self._file and self._tensorboard:
                self._file.close()
                self._tensorboard.close()

    def sync(self) -> dict[str, str]:
        """Returns `checksums` once the disk holds all that was recorded: before a checkpoint, so that none is ahead."""
        if self._file and self._tensorboard:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise _unwritten(self._path, error) from error
        return self._checksums

    def started(self, step: int, seconds: float) -> None:
        """Starts the clock of images/s and time left: called when the first step has ended, which took `seconds`."""
        self._clock, self._first_seconds = (step, time.monotonic()), seconds

    def paused(self, seconds: float) -> None:
        """Takes time that was not training (evaluation, saving) out of the clock."""
        if self._clock:
            self._clock = (self._clock[0], self._clock[1] + seconds)

    def images_per_second(self, step: int) -> float:
        """Returns the mean training rate since the clock started; 0 before there is one."""
        if self._clock is None or step <= self._clock[0]:
            return 0.0
        return (step - self._clock[0]) * self._batch / max(time.monotonic() - self._clock[1], 1e-9)

    def step_seconds(self, step: int) -> float:
        """Returns the mean time of a step since the clock started; before, that of the first step."""
        rate = self.images_per_second(step)
        return self._batch / rate if rate else self._first_seconds

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Records one training step and shows it."""
        self._record(step, "train", {**values, "images_per_second": self.images_per_second(step)})
        self.show(step, values)

    def is_due(self) -> bool:
        """Returns whether no step was shown for so long that the next one should be."""
        return time.monotonic() - self._shown > SHOW_SECONDS

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows one training step: on a terminal always, in a file not too often."""
        rate, seconds = self.images_per_second(step), self.step_seconds(step)
        self._line.done, self._line.parts = (
            step,
            [
                f"{_duration((self._total - step) * seconds)} left",
                f"step {step}/{self._total}",
                f"loss {values['loss']:.4f}",
                f"accuracy {values['accuracy']:.1%}",
                f"{rate:,.0f} images/s" if rate else f"first step {seconds:.1f} s",
            ],
        )
        self._shown = now = time.monotonic()
        if not self._live and (now - self._printed > PLAIN_SECONDS or step == self._total):
            self._printed = now
            console.print("  ".join(self._line.parts))

    def testing(self) -> None:
        """Shows that the run is being tested, which may take long."""
        self._line.parts = ["testing"]
        if not self._live:
            console.print("testing")

    def evaluation(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Records and prints metrics of a whole split."""
        self._record(step, split, values)
        console.print(f"step {step}/{self._total}  {split}: accuracy {values['accuracy']:.2%}  nll {values['nll']:.4f}")

    def _record(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        if not self._file or not self._tensorboard:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        scalars = [
            summary.scalar(f"{kind}/{name}", value).value[0] for name, value in finite.items() if value is not None
        ]
        event = Event(step=step, wall_time=time.time())
        event.summary.value.extend(scalars)
        line = json.dumps({"step": step, "kind": kind, **finite}) + "\n"
        self._checksums[METRICS] = f"{zlib.crc32(line.encode(), int(self._checksums[METRICS], 16)):08x}"
        try:
            self._file.write(line)
            self._file.flush()
            self._tensorboard.write_event(event)
            self._tensorboard.flush()
        except OSError as error:
            raise _unwritten(self._path, error) from error


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints rows of text cells as a table; columns are the first row's keys."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    # A file has no edge to fold cells at, but where COLUMNS gives it one.
    wide = Console(width=None if os.environ.get("COLUMNS") else 200, highlight=False, markup=False)
    (console if console.is_terminal else wide).print(table)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows of text cells as a Markdown table."""
    names = list(rows[0])
    rules = [":--" if name in LEFT else "--:" for name in names]
    lines = [names, rules, *([str(cell) for cell in row.values()] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def read_result(workdir: Path) -> dict[str, Any]:
    """Returns the run's result.json; {} where there is none. Raises UserError where it is damaged."""
    remedy = "delete it and write it anew with jvitmoe.evaluate"
    path = workdir / RESULT
    result = _read_json(path, RESULT_FORM, "a result", remedy) or {}
    rest = {name: value for name, value in result.items() if name != "checksum"}
    if result.get("checksum") not in (None, checksum(rest)):
        raise UserError(f"{path} does not match its checksum; {remedy}")
    return result


def write_classes(workdir: Path, names: Sequence[str]) -> None:
    """Keeps the names of the classes, in the order of their labels."""
    write_text(workdir / CLASSES, json.dumps(list(names), indent=1) + "\n")


def read_classes(workdir: Path) -> tuple[str, ...]:
    """Returns the names of the classes; () where the run kept none. Raises UserError where the file is damaged."""
    remedy = "delete it, and classes go by number"
    return tuple(_read_json(workdir / CLASSES, [str], "a list of names", remedy) or ())


def write_images(workdir: Path, counts: Mapping[str, int]) -> None:
    """Keeps the number of images of each split, by which a run that goes on knows its data again."""
    write_text(workdir / IMAGES, json.dumps(dict(counts)) + "\n")


def read_images(workdir: Path) -> dict[str, int] | None:
    """Returns split -> number of images; None where the run kept none. Raises UserError where the file is damaged."""
    remedy = "delete it if the data are the same"
    counts: dict[str, int] | None = _read_json(workdir / IMAGES, {"*": int}, "the numbers of images", remedy)
    return counts


# Forms of JSON values: a type, [form of each entry], or {name: form}. A name with ? may be absent or null; * stands
# for all other names.
RESULT_FORM = {
    "rows": [{"model": str, "accuracy": float, "*": float}],
    **{"step": int, "active_parameters": int, "total_parameters": int, "hardware": str},
    **{"data?": str, "seed?": int, "images_per_second?": float, "trained_on?": str, "versions?": {"*": str}},
    "mergeability?": {"barrier": {"height": float}, "gap": [float]},
}


def _read_json(path: Path, form: Any, what: str, remedy: str) -> Any:
    """Returns the value in a JSON file; None where there is none. Raises UserError where it cannot be read or does not
    have the form."""
    try:
        value = json.loads(path.read_bytes())
        _check_form(value, form, "the whole")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; let it be read") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {what}: {one_line(error)}; {remedy}") from error
    return value


def _check_form(value: Any, form: Any, name: str) -> None:
    """Raises ValueError for what in a JSON value does not have the form."""
    if isinstance(form, type):
        kinds, number = (float, int) if form is float else (form,), isinstance(value, int)
        fits = type(value) in kinds and not (number and abs(value) >= 2**63)
    else:
        fits = isinstance(value, type(form)) and (len(value) > 0 or isinstance(value, dict))
    if not fits:
        kind = form.__name__ if isinstance(form, type) else f"{type(form).__name__} with entries"
        raise ValueError(f"{name} is {type(value).__name__}, not {kind}")
    if isinstance(form, list):
        for entry in value:
            _check_form(entry, form[0], f"an entry of {name}")
    elif isinstance(form, dict):
        for key in {name.rstrip("?") for name in form} - {"*"}:
            if key in form or value.get(key) is not None:
                _check_form(value.get(key), form.get(key, form.get(f"{key}?")), key)
        for key in (value.keys() - form.keys()) if "*" in form else ():
            _check_form(value[key], form["*"], key)


def result_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the rows of a run's result.json as text cells; mean ± deviation where a row is of several paths."""
    return [
        {
            "model": row["model"],
            **metric_cells(row),
            "images": f"{row['images']:,}",
            "parameters": f"{row.get('parameters', result['active_parameters']):,}",
            **({"FLOPs/image": quantity(row["flops_per_image"])} if "flops_per_image" in row else {}),
        }
        for row in result["rows"]
    ]


def metric_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the cells of accuracy, nll and ece, each with its `*_std` if it has one; ece only if it was measured."""
    formats = {name: form for name, form in (("accuracy", ".2%"), ("nll", ".4f"), ("ece", ".4f")) if name in row}
    return {
        name: f"{row[name]:{form}}" + (f" ± {row[f'{name}_std']:{form}}" if f"{name}_std" in row else "")
        for name, form in formats.items()
    }


def quantity(number: float) -> str:
    """Returns a large number in three digits: 5.46 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def write_result(workdir: Path, result: Mapping[str, Any]) -> None:
    """Writes result.json and report.md and prints the tables."""
    write_text(workdir / RESULT, json.dumps({**result, "checksum": checksum(result)}, indent=2) + "\n")
    rows = result_rows(result)
    about = (
        f"Test split of {result['data']}, checkpoint at step {result['step']}, seed {result['seed']}. "
        f"Parameters: {result['active_parameters']:,} active, {result['total_parameters']:,} total. "
        f"Hardware: {result['hardware']}. Versions: "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + "."
    )
    text = f"# {workdir.name}\n\n{markdown(rows)}\n{about}\n"
    show(rows, f"{workdir.name}: {result['data']} test split, step {result['step']}")
    if why := result.get("mergeability"):
        layers = _layer_rows(why)
        barrier = (
            f"Highest rise of the loss on the way from an expert to the mean: {why['barrier']['height']:.4f} nats."
        )
        text += f"\n## Why averaging works or fails\n\n![mergeability]({MERGEABILITY})\n\n{markdown(layers)}\n"
        text += f"{barrier} {LEGEND} Measured on {why['images']:,} test images.\n"
        show(layers, "experts of each layer")
        console.print(barrier)
    write_text(workdir / "report.md", text)


LEGEND = (
    "Spread: how far experts are from their mean, relative to it. Cosine: of two experts' weights, mean of pairs. "
    "Closest pair: largest cosine of two experts' differences from the mean, which average to about -1 / (E - 1). "
    "Layer gap: how far the output of the mean expert is from the mean of the experts' outputs, relative to it."
)


def _layer_rows(why: Mapping[str, Any]) -> list[dict[str, str]]:
    columns = {"spread": "spread", "cosine": "cosine", "closest pair": "difference_cosine", "layer gap": "gap"}
    return [
        {"layer": str(layer), **{title: f"{why[name][x]:.4f}" for title, name in columns.items()}}
        for x, layer in enumerate(why["layers"])
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
