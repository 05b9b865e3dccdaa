"""The log of a running training: it writes metrics.jsonl, feeds trackers, and shows the progress line."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.live import Live

from jvitmoe.runs.console import DAY, ProgressLine, console, duration
from jvitmoe.runs.safe_io import METRICS, checksums, crc32, metrics_up_to, write_text, writing
from jvitmoe.runs.trackers import Feed, TrackedRun, close_all

PLAIN_SECONDS = 2.0  # shortest time between two progress lines in a file
SHOW_SECONDS = 20.0  # longest time without progress of one process, unless a step, evaluation or save takes longer


class MetricsLog:
    """The log of one run of `total` steps, of which `start` are done; a context manager.

    Args:
        workdir: the run folder, which exists; None writes nothing, for processes other than the first.
        batch_size: images per step, for images/s.
        trackers: names in `trackers.TRACKERS`.
        settings: {"section.field": value} of the run, for the trackers.
    """

    def __init__(
        self,
        workdir: Path | None,
        start: int,
        total: int,
        batch_size: int,
        trackers: Iterable[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._file, self._feeds = None, list[Feed]()
        self._checksums: dict[str, str] = {}
        if workdir and (start < total or (workdir / METRICS).exists()):  # a finished run does not make an empty file
            self._path = workdir / METRICS
            write_text(self._path, metrics_up_to(workdir, start))
            self._checksums = checksums(workdir, start)
            with writing(self._path):
                self._file = self._path.open("a")
        if workdir:
            self._feeds = [Feed(name, TrackedRun(workdir, start, settings or {})) for name in trackers]
        self._total, self._batch = total, batch_size
        self._clock: tuple[int, float] | None = None  # step and time at which the measured interval starts
        self._warned = False
        self._first_seconds = 0.0  # duration of the step before that
        self._shown = self._printed = -math.inf  # time when a step was last shown, and printed
        self._line = ProgressLine(["compiling"], start, total)
        # Transient: a line that stays would tell an old time left after Ctrl-C.
        self._live = Live(self._line, console=console, transient=True) if console.is_terminal else None
        self._cell = _cell(self._line) if workdir and console.is_jupyter else None

    def __enter__(self) -> "MetricsLog":
        if self._live:
            self._live.start()
            console.show_cursor(True)  # rich hides it, and a killed process cannot show it again
        elif not self._cell and self._line.done < self._total:
            console.print("compiling")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.stop()
        close_all(self._feeds, finished=kind is None)
        with contextlib.suppress(OSError):  # the disk is full, which an earlier write has reported
            if self._file:
                self._file.close()

    def sync(self) -> dict[str, str]:
        """Returns `safe_io.checksums` after the disk holds all records. Called before a checkpoint is saved, so that no
        checkpoint is ahead of the history."""
        if self._file:
            with writing(self._path):
                os.fsync(self._file.fileno())
        return self._checksums

    def started(self, step: int, seconds: float) -> None:
        """Starts the measurement of images/s and time left after the first step, which took `seconds`."""
        self._clock, self._first_seconds = (step, time.monotonic()), seconds

    def paused(self, seconds: float) -> None:
        """Excludes time of evaluation and saving from the measurement."""
        if self._clock:
            self._clock = (self._clock[0], self._clock[1] + seconds)

    def images_per_second(self, step: int) -> float:
        """Returns the mean training rate since `started`; 0 before the next step."""
        if self._clock is None or step <= self._clock[0]:
            return 0.0
        return (step - self._clock[0]) * self._batch / max(time.monotonic() - self._clock[1], 1e-9)

    def step_seconds(self, step: int) -> float:
        """Returns the mean duration of a step since `started`; before the next step, that of the first."""
        rate = self.images_per_second(step)
        return self._batch / rate if rate else self._first_seconds

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Records one training step and shows it."""
        self._record(step, "train", {**values, "images_per_second": self.images_per_second(step)})
        self.show(step, values)

    def is_due(self) -> bool:
        """Returns whether the last shown step is so old that the next one should be shown."""
        return time.monotonic() - self._shown > SHOW_SECONDS

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows one training step: on a terminal always, in a file at most every PLAIN_SECONDS."""
        rate, seconds = self.images_per_second(step), self.step_seconds(step)
        left = (self._total - step) * seconds
        if rate and left > DAY and not self._warned:
            self._warned = True
            remedies = "a GPU, fewer --config.train.epochs, or a model of a smaller --config.model.width"
            console.print(f"note: this will take {duration(left)} on this machine; shorter: {remedies}")
        self._line.done = step
        self._line.texts = [
            *([f"{duration(left)} left"] if rate else []),  # the first step may take much longer than the others
            f"step {step}/{self._total}",
            f"loss {values['loss']:.4f}",
            f"accuracy {values['accuracy']:.1%}",
            f"{rate:,.0f} images/s" if rate else f"first step {seconds:.1f} s",
        ]
        self._shown = now = time.monotonic()
        if self._cell:
            self._cell.update(self._line)
        elif not self._live and (now - self._printed > PLAIN_SECONDS or step == self._total):
            self._printed = now
            console.print("  ".join(self._line.texts))

    def testing(self) -> None:
        """Shows that the test of the run has begun."""
        self._line.begin("testing")
        if self._cell:
            self._cell.update(self._line)
        elif not self._live:
            console.print("testing")

    def evaluation(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Records and prints metrics of a whole split."""
        self._record(step, split, values)
        console.print(f"step {step}/{self._total}  {split}: accuracy {values['accuracy']:.2%}  nll {values['nll']:.4f}")

    def tested(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Hands accuracy and NLL of each tested model to the trackers, as "final/merged/accuracy"; shows the end."""
        figures = {f"final/{row['model']}/{name}": row[name] for row in rows for name in ("accuracy", "nll")}
        self._feed(step, {name: value for name, value in figures.items() if math.isfinite(value)})
        if self._live:  # tables follow
            self._live.stop()
        if self._cell:
            self._line.texts = ["tested"]
            self._cell.update(self._line)

    def _record(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        if not self._file:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no nan
        line = json.dumps({"step": step, "kind": kind, **finite}) + "\n"
        self._checksums[METRICS] = crc32(line.encode(), self._checksums[METRICS])
        with writing(self._path):
            self._file.write(line)
            self._file.flush()
        self._feed(step, {f"{kind}/{name}": value for name, value in finite.items() if value is not None})

    def _feed(self, step: int, figures: Mapping[str, float]) -> None:
        for feed in self._feeds:
            feed.record(step, figures)


def _cell(line: ProgressLine) -> Any:
    """Returns the place in a notebook's output where a line is shown, to update it."""
    from IPython.display import display  # a notebook has it

    return display(line, display_id=True)
