"""The log of a run: metrics.jsonl, TensorBoard, and the progress line."""

import contextlib
import json
import math
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.live import Live
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jvitmoe.errors import UserError
from jvitmoe.runs.console import ProgressLine, console, duration
from jvitmoe.runs.files import CLASSES, IMAGES, METRICS, unwritten, write_text


def checksums(workdir: Path, step: int) -> dict[str, str]:
    """Returns name -> CRC-32 of the history up to a step, and of the files that are written once."""
    texts = {name: (workdir / name).read_bytes() for name in (CLASSES, IMAGES) if (workdir / name).is_file()}
    if (workdir / METRICS).exists():
        texts[METRICS] = _history(workdir, step).encode()
    return {name: f"{zlib.crc32(text):08x}" for name, text in texts.items()}


def _history(workdir: Path, step: int) -> str:
    lines = [line for line in read_metrics(workdir / METRICS) if line["step"] <= step]
    return "".join(json.dumps(line) + "\n" for line in lines)


PLAIN_SECONDS = 2.0  # least time between two progress lines in a file
SHOW_SECONDS = 20.0  # longest time without progress shown, but for a step, an evaluation or a save that takes longer


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
                raise unwritten(path, error) from error
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
                raise unwritten(self._path, error) from error
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
                f"{duration((self._total - step) * seconds)} left",
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
            raise unwritten(self._path, error) from error
