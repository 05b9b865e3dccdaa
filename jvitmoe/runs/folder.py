"""The folder of a run: whether a run may use it, its lock, and the files that describe the run."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.data import datasets
from jvitmoe.errors import ConfigError, UserError
from jvitmoe.runs import checkpoints, files, lock
from jvitmoe.runtime import processes

SHARED_SECONDS = 8.0  # a network disk may take a moment to show a new file


def check_folder(workdir: Path, config: Config) -> None:
    """Raises ConfigError where the folder holds another experiment, or files that are no run. Writes nothing."""
    saved = workdir / files.CONFIG
    try:
        if not workdir.exists():
            return
        if not workdir.is_dir():
            raise ConfigError(f"workdir {str(workdir)!r} is a file; it must be a folder; set --workdir")
        files.refuse_links(workdir)
        if not saved.is_file():
            of_killed_start = lock.NAME, saved.name + files.UNFINISHED
            if any(path.name not in of_killed_start for path in workdir.iterdir()):
                raise ConfigError(f"workdir {str(workdir)!r} holds other files than a run; set --workdir to a new one")
            return
        text = saved.read_text()
    except (OSError, ValueError) as error:  # ValueError: the file or the name is not UTF-8
        raise ConfigError(f"workdir {str(workdir)!r} cannot be read: {error}; set --workdir to another") from error
    changed = datasets.differences(config_lib.loads(text, str(saved)), config)
    if changed:
        listed = ", ".join(f"{name} was {old!r} and is {new!r} now" for name, (old, new) in changed.items())
        raise ConfigError(f"workdir {str(workdir)!r} holds another experiment: {listed}; set --workdir to a new folder")


def open_run_folder(
    workdir: Path, config: Config, class_names: Sequence[str], counts: Mapping[str, int]
) -> contextlib.AbstractContextManager[object]:
    """Makes the run folder, locks it and writes the config, class names and image counts, in process 0. Returns the
    lock.

    Raises UserError where that fails, and ConfigError where another experiment started in the folder after
    `check_folder`, or the data differ from those of the folder's checkpoints.
    """
    if not processes.is_first():
        return contextlib.nullcontext()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir {str(workdir)!r} cannot be made: {error.strerror}; set --workdir") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.Lock(workdir))
        check_folder(workdir, config)
        if checkpoints.list_steps(workdir / files.CHECKPOINTS):
            _check_data(workdir, class_names, counts)
        files.write_text(workdir / files.CONFIG, config_lib.dumps(config))
        files.write_text(workdir / files.CLASSES, json.dumps(list(class_names), indent=1) + "\n")
        files.write_text(workdir / files.IMAGES, json.dumps(dict(counts)) + "\n")
        return stack.pop_all()


def _check_data(workdir: Path, class_names: Sequence[str], counts: Mapping[str, int]) -> None:
    """Raises ConfigError where classes or numbers of images differ from those at the start of the run. `data.dir` may
    change on resuming, so nothing else notices other data."""
    old_counts, old_names = files.read_images(workdir) or counts, files.read_classes(workdir)
    changed = [
        f"{old_counts.get(name, 0):,} {name} images, {count:,} now"
        for name, count in counts.items()
        if old_counts.get(name) != count
    ]
    if old_names and old_names != tuple(class_names):
        changed.append("other classes")
    if changed:
        raise ConfigError(
            f"workdir {str(workdir)!r} holds a run on other data: {'; '.join(changed)}; "
            "set --config.data.dir to what it was, or --workdir to a new folder"
        )


def check_shared(workdir: Path) -> None:
    """Raises UserError where a process does not see the run folder that process 0 made."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not (workdir / files.CONFIG).exists():
        if time.monotonic() > deadline:
            raise UserError(f"workdir {str(workdir)!r} is not on a disk that all processes see; set --workdir to one")
        time.sleep(0.2)
