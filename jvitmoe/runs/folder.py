"""The folder of a run: whether a run may use it, its lock, the files that describe the run, and which are sound."""

import contextlib
import fcntl
import json
import operator
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jvitmoe import config as config_lib
from jvitmoe import rules
from jvitmoe.config import Config
from jvitmoe.data import sources
from jvitmoe.errors import ConfigError, UserError, first_few
from jvitmoe.machine import processes
from jvitmoe.runs import checkpoints, safe_io
from jvitmoe.runs.console import console

LOCK = "lock"
SHARED_SECONDS = 8.0  # a network disk may take a moment to show a new file


def check_folder(workdir: Path, config: Config) -> None:
    """Raises ConfigError where the folder holds checkpoints of another experiment, results that a new start would
    replace, or files that are no run. Writes nothing."""
    saved = workdir / safe_io.CONFIG
    try:
        if not workdir.exists():
            return
        if not workdir.is_dir():
            raise ConfigError(f"workdir {str(workdir)!r} is a file; it must be a folder; set --workdir")
        safe_io.refuse_links(workdir)
        if not saved.is_file():
            of_killed_start = LOCK, saved.name + safe_io.UNFINISHED
            if any(path.name not in of_killed_start for path in workdir.iterdir()):
                raise ConfigError(f"workdir {str(workdir)!r} holds other files than a run; set --workdir to a new one")
            return
        if not checkpoints.list_steps(workdir / safe_io.CHECKPOINTS):
            if not (workdir / safe_io.RESULT).exists():
                return  # a start that failed: its remedy may be another setting
            held = "holds the results of a run without its checkpoints"
            raise ConfigError(f"workdir {str(workdir)!r} {held}; set --workdir to a new folder")
        text = safe_io.read_bytes(saved) or b""
    except (OSError, ValueError) as error:  # ValueError: the name is not UTF-8
        raise ConfigError(f"workdir {str(workdir)!r} cannot be read: {error}; set --workdir to another") from error
    changed = sources.differences(config_lib.loads(text, str(saved)), config)
    if [*changed] == ["train.epochs"] and operator.lt(*changed["train.epochs"]) and _has_ended(workdir):
        return  # it is trained longer
    if changed:
        listed = first_few([f"{name} was {old!r} and is {new!r} now" for name, (old, new) in changed.items()])
        longer = "; a run is trained longer after its end: repeat its own command first"
        remedy = f"set --workdir to a new folder{longer if [*changed] == ['train.epochs'] else ''}"
        raise ConfigError(f"workdir {str(workdir)!r} holds another experiment: {listed}; {remedy}")


def _has_ended(workdir: Path) -> bool:
    """True if the newest checkpoint was tested."""
    steps = checkpoints.list_steps(workdir / safe_io.CHECKPOINTS)
    return bool(steps) and safe_io.read_result(workdir).get("step") == steps[-1]


def open_run_folder(
    workdir: Path, config: Config, class_names: Sequence[str], images: Mapping[str, int | str], experiment: bytes = b""
) -> contextlib.AbstractContextManager[object]:
    """Makes the run folder, locks it and writes the config, class names, image counts and hashes of the data, and the
    text of the user's experiment file if there is one, in process 0. Returns the lock. Raises UserError where that
    fails, where another experiment has started in the folder since `check_folder`, and where the data differ from those
    of its checkpoints."""
    if not processes.is_first():
        return contextlib.nullcontext()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir {str(workdir)!r} cannot be made: {error.strerror}; set --workdir") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(workdir))
        check_folder(workdir, config)
        if checkpoints.list_steps(workdir / safe_io.CHECKPOINTS):
            _check_data(workdir, class_names, images)
            if safe_io.read_bytes(workdir / safe_io.EXPERIMENT) not in (None, experiment):
                told = "differs from this run's last" if experiment else "of this run is not executed without --plugin"
                console.print(f"note        the experiment file {told}, {workdir / safe_io.EXPERIMENT}")
        else:  # what another run left that ended before its first checkpoint
            (workdir / safe_io.EXPERIMENT).unlink(missing_ok=True)
        safe_io.write_text(workdir / safe_io.CONFIG, config_lib.dumps(config))
        safe_io.write_text(workdir / safe_io.CLASSES, json.dumps(list(class_names), indent=1) + "\n")
        safe_io.write_text(workdir / safe_io.IMAGES, json.dumps(dict(images)) + "\n")
        if experiment:
            safe_io.write_bytes(workdir / safe_io.EXPERIMENT, experiment)
        return stack.pop_all()


def _check_data(workdir: Path, class_names: Sequence[str], images: Mapping[str, int | str]) -> None:
    """Raises ConfigError where classes, numbers of images or hashes of the data differ from those at the start of the
    run. `data.dir` may change on resuming, so nothing else notices other data."""
    old_images, old_names = safe_io.read_images(workdir) or images, safe_io.read_classes(workdir)
    changed = [
        f"another {name}" if isinstance(now, str) else f"{old_images.get(name, 0):,} {name} images, {now:,} now"
        for name, now in images.items()
        if old_images.get(name) != now
    ]
    if old_names and old_names != tuple(class_names):
        changed.append("other classes")
    if changed:
        remedy = "set --config.data.dir to what it was, or --workdir to a new folder"
        raise ConfigError(f"workdir {str(workdir)!r} holds a run on other data: {'; '.join(changed)}; {remedy}")


def check_shared(workdir: Path) -> None:
    """Raises UserError where a process does not see the run folder that process 0 made."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not (workdir / safe_io.CONFIG).exists():
        if time.monotonic() > deadline:
            raise UserError(f"workdir {str(workdir)!r} is not on a disk that all processes see; set --workdir to one")
        time.sleep(0.2)


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """The lock of a run folder, which must exist: one writer at a time. The system releases it when the context manager
    or the process ends, however it ends.

    The file `lock` names the process that holds it. The file stays, because only the system's lock on it counts: the
    file of a dead process blocks nothing.

    Raises UserError where another process holds the lock, with its pid and host, and where the file cannot be written.
    """
    path = workdir / LOCK
    try:
        file: IO[str] = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
    except OSError as error:
        reason = error.strerror or str(error)  # of a pipe: it cannot be sought in
        raise UserError(f"{path} cannot be opened: {reason}; let the run folder be written") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            held = f"workdir {str(workdir)!r} is being written by {_holder(file)}"
            raise UserError(f"{held}; wait for it, stop it, or set --workdir") from error
        except OSError:  # some network disks have no locks; the name in the file still helps a person
            pass
        with safe_io.writing(path):
            file.seek(0)
            file.truncate()
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
            file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):  # of a full disk: closing tries to write again
            file.close()


def _holder(file: IO[str]) -> str:
    try:
        holder = json.loads(file.read(1000))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]!r}"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "a process that has not written its name yet"


def verify(workdir: Path) -> Iterator[tuple[str, str]]:
    """Yields (checkpoint or file, what is wrong with it, or "" if it is sound). Writes nothing.

    Covers the checkpoints and the files that other commands read; `tb/`, `report.md` and the pictures repeat them. A
    checkpoint holds fingerprints of its arrays and checksums of other files.
    """
    reader = checkpoints.Checkpoints(workdir / safe_io.CHECKPOINTS)
    if not (steps := reader.steps()):
        yield safe_io.CHECKPOINTS, "there is none"
    metas, faults = dict[int, dict[str, Any]](), dict[int, str]()
    for step in steps:
        try:
            metas[step] = reader.check(step)
        except UserError as error:
            faults[step] = str(error)
    with contextlib.suppress(UserError):  # of config.json, which is checked below
        others = {step: text for step, meta in metas.items() if (text := reader.difference(meta))}
        if len(others) < len(metas):  # if all are of another run, it is config.json that is
            faults |= others
    for step in steps:
        yield f"checkpoint {step}", faults.get(step, "")
    meta = metas.get(max(metas.keys() - faults, default=0), {"step": 0})
    for name in CHECKS:
        if (workdir / name).exists() or name in (safe_io.CONFIG, safe_io.METRICS, *meta.get("files", ())):
            fault = ""
            try:
                _check_file(workdir, name, meta)
            except (UserError, OSError) as error:
                fault = str(error)
            yield name, fault


def _check_file(workdir: Path, name: str, meta: dict[str, Any]) -> None:
    if not (workdir / name).exists():
        raise UserError("it is missing; restore it from a copy")
    CHECKS[name](workdir, meta)
    safe_io.compare(workdir, meta["step"], {n: text for n, text in meta.get("files", {}).items() if n == name})


def _check_config(workdir: Path, meta: dict[str, Any]) -> None:
    rules.check(config_lib.loads(safe_io.read_bytes(workdir / safe_io.CONFIG) or b"", safe_io.CONFIG))
    if "config" in meta and (fault := checkpoints.Checkpoints(workdir / safe_io.CHECKPOINTS).difference(meta)):
        raise UserError(f"checkpoint {meta['step']} has other settings: {fault}; restore {safe_io.CONFIG} from a copy")


REPAIRED = f"resuming the training (of a run that has ended, after deleting {safe_io.RESULT})"


def _check_metrics(workdir: Path, meta: dict[str, Any]) -> None:
    try:
        lines = [json.loads(text) for text in safe_io.metrics_lines(workdir / safe_io.METRICS)]
        steps, keys = [line["step"] for line in lines], {(line["step"], line["kind"]) for line in lines}
        if len(keys) < len(lines):
            raise UserError(f"it has two lines for one step; {REPAIRED} repairs it")
        if steps != sorted(steps):
            raise UserError("its steps are out of order")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"a line is damaged ({type(error).__name__}); {REPAIRED} drops that line") from error


CHECKS: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    safe_io.CONFIG: _check_config,
    safe_io.METRICS: _check_metrics,
    safe_io.CLASSES: lambda workdir, _: safe_io.read_classes(workdir),
    safe_io.IMAGES: lambda workdir, _: safe_io.read_images(workdir),
    safe_io.RESULT: lambda workdir, _: safe_io.read_result(workdir),
}
