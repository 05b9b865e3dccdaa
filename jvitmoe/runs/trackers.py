"""Trackers: what follows a run beside its metrics.jsonl, chosen with `--trackers tensorboard,wandb`.

Each one works in a thread of its own, so that one that is slow, hangs or fails neither delays nor stops the run. A run
that resumes goes on in the same run of the tracker, whose id is kept in <run folder>/trackers.
"""

import abc
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jvitmoe.errors import UserError, one_line
from jvitmoe.extras import is_installed
from jvitmoe.runs.console import console
from jvitmoe.runs.safe_io import read_bytes, write_bytes

DEFAULT = ("tensorboard",)
CLOSE_SECONDS = 30.0  # how long the end of a run waits for what its trackers still have to send
STOP_SECONDS = 3.0  # the same where a run stops early: a signal promises an end within 10 s
THREAD = "tracker "  # in the names of their threads


class TrackedRun(NamedTuple):
    """The run that a tracker follows."""

    workdir: Path
    start: int  # steps done
    settings: Mapping[str, Any]  # {"section.field": value}


class Tracker(abc.ABC):
    """Where figures of a run go. Methods may raise any exception: the run then goes on without the tracker."""

    package = ""  # that it needs, if that is not one of ours

    @abc.abstractmethod
    def __init__(self, run: TrackedRun) -> None: ...

    @abc.abstractmethod
    def record(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """Takes {"train/loss": 0.5} of a step, at a time in seconds since 1970. A resumed run may repeat steps, with
        the same figures."""

    @abc.abstractmethod
    def close(self, finished: bool) -> None:
        """Ends the record; `finished` is False if the run stopped before its last step."""


class TensorBoard(Tracker):
    """Event files in <run folder>/tb."""

    def __init__(self, run: TrackedRun) -> None:
        folder = run.workdir / "tb"
        folder.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread ends when the disk is full, and then every call waits for it forever.
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(step=run.start + 1, session_log=SessionLog(status=SessionLog.START)))

    def record(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        event = Event(step=step, wall_time=seconds)
        for name, value in figures.items():
            event.summary.value.extend(summary.scalar(name, value).value)
        self._writer.write_event(event)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class Wandb(Tracker):
    """Weights & Biases; with WANDB_MODE=offline into <run folder>/trackers/wandb, for `wandb sync`."""

    package = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        settings = wandb.setup().settings
        if settings.mode == "online" and not wandb.login(prompt=False):  # wandb.init would ask for a key
            raise UserError("there is no key; run wandb login, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=settings.project or "jvitmoe",
            name=run.workdir.resolve().name,
            id=_id(run, "wandb"),
            resume="allow",
            config=dict(run.settings),
            dir=run.workdir / "trackers",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")  # wandb's own step must not fall, as ours does on resuming

    def record(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that does not exist, is named twice, or whose package is not installed."""
    for name in names:
        if names.count(name) > 1 or name not in TRACKERS:
            rule = f"{name!r} must be one of {', '.join(TRACKERS)}, and named once"
            raise UserError(f"--trackers is {','.join(names)!r}; {rule}")
        package = TRACKERS[name].package
        if package and not is_installed(package):
            raise UserError(f"--trackers {name} needs {package}; install it with pip install 'jvitmoe[{name}]'")


class Feed:
    """A tracker at work in its thread."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name, self._run = name, run
        self._records: queue.SimpleQueue[tuple[int, float, Mapping[str, float]] | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"{THREAD}{name}", daemon=True)
        self._thread.start()

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Hands figures of a step over; returns at once."""
        if self._thread.is_alive():
            self._records.put((step, time.time(), figures))

    def end(self, finished: bool) -> None:
        """Says that no figures follow; returns at once."""
        self._records.put(finished)

    def has_ended(self, seconds: float) -> bool:
        """Waits at most so long for what is not sent yet."""
        self._thread.join(max(seconds, 0))
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self.name](self._run)
            while not isinstance(record := self._records.get(), bool):
                tracker.record(*record)
            tracker.close(record)
        except (Exception, SystemExit) as error:
            reason = str(error) if isinstance(error, UserError) else one_line(error)
            console.print(f"warning: tracker {self.name} failed ({reason}); the run goes on without it")


def close_all(feeds: Sequence[Feed], finished: bool) -> None:
    """Ends the feeds. Together they get CLOSE_SECONDS, or STOP_SECONDS if the run stopped before its last step."""
    limit = CLOSE_SECONDS if finished else STOP_SECONDS
    deadline = time.monotonic() + limit
    for feed in feeds:
        feed.end(finished)
    for feed in feeds:
        if not feed.has_ended(deadline - time.monotonic()):
            console.print(f"warning: tracker {feed.name} did not end in {limit:g} s; its record may be short")


def are_hanging() -> bool:
    """True if a tracker is still at work. After a run, its package may wait for it at the end of the process."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def _id(run: TrackedRun, name: str) -> str:
    """Returns the tracker's id of this run: the one kept in the run folder, or else a new one, which is kept."""
    path = run.workdir / "trackers" / f"{name}.id"
    path.parent.mkdir(exist_ok=True)
    if (kept := read_bytes(path)) is None:
        kept = secrets.token_hex(6).encode()
        write_bytes(path, kept)
    return kept.decode().strip()
