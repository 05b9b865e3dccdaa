"""The folder of a run: whether it may be used, its lock, and what its data were."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jvitmoe import config as config_lib
from jvitmoe.config import Config
from jvitmoe.data import datasets
from jvitmoe.errors import ConfigError, UserError
from jvitmoe.runs import checkpoints, lock
from jvitmoe.runs.files import PART, read_classes, read_images, refuse_links, write_classes, write_images, write_text
from jvitmoe.runtime import processes

SHARED_SECONDS = 8.0


def claim(workdir: Path, config: Config) -> None:
    """Raises ConfigError where the folder holds another experiment, or things that are no run. Writes nothing."""
    saved = workdir / "config.json"
    try:
        if not workdir.exists():
            return
        if not workdir.is_dir():
            raise ConfigError(f"workdir {str(workdir)!r} is a file; it must be a folder; set --workdir")
        refuse_links(workdir)
        if not saved.is_file():
            # A run that was killed at its very start has left these.
            if any(path.name not in (lock.NAME, saved.name + PART) for path in workdir.iterdir()):
                raise ConfigError(
                    f"workdir {str(workdir)!r} holds other things than a run; set --workdir to a new folder"
                )
            return
        text = saved.read_text()
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, in the file or the name
        raise ConfigError(f"workdir {str(workdir)!r} cannot be read: {error}; set --workdir to another") from error
    changed = datasets.differences(config_lib.loads(text, str(saved)), config)
    if changed:
        listed = ", ".join(f"{name} was {old!r} and is {new!r} now" for name, (old, new) in changed.items())
        raise ConfigError(f"workdir {str(workdir)!r} holds another experiment: {listed}; set --workdir to a new folder")


def open_run_folder(
    workdir: Path, config: Config, class_names: Sequence[str], counts: Mapping[str, int]
) -> contextlib.AbstractContextManager[object]:
    """Makes the run folder, locks it and writes its config and what its data are, by process 0; returns the lock.

    Raises UserError where that cannot be, and ConfigError where another experiment has moved in since `claim`, or the
    data are no longer those that the folder's checkpoints were trained on.
    """
    if not processes.first():
        return contextlib.nullcontext()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir {str(workdir)!r} cannot be made: {error.strerror}; set --workdir") from error
    held = lock.Lock(workdir)
    try:
        claim(workdir, config)
        if checkpoints.list_steps(workdir / "checkpoints"):
            _check_data(workdir, class_names, counts)
        write_text(workdir / "config.json", config_lib.dumps(config))
        write_classes(workdir, class_names)
        write_images(workdir, counts)
    except UserError:
        with held:
            raise
    return held


def _check_data(workdir: Path, class_names: Sequence[str], counts: Mapping[str, int]) -> None:
    """Raises ConfigError where the data have other images or classes than when the run in the folder started: it would
    go on in another order. `data.dir` may change on resuming, so this is all that tells."""
    were, names = read_images(workdir) or counts, read_classes(workdir)
    changed = [
        f"{were.get(name, 0):,} {name} images, {count:,} now"
        for name, count in counts.items()
        if were.get(name) != count
    ]
    if names and names != tuple(class_names):
        changed.append("other classes")
    if changed:
        raise ConfigError(
            f"workdir {str(workdir)!r} holds a run on other data: {'; '.join(changed)}; "
            "set --config.data.dir to what it was, or --workdir to a new folder"
        )


def check_shared(workdir: Path) -> None:
    """Raises UserError where a process cannot see the run folder that process 0 made."""
    saved = workdir / "config.json"
    deadline = time.monotonic() + SHARED_SECONDS  # a shared disk may take a moment to show a new file
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    if not saved.exists():
        raise UserError(f"workdir {str(workdir)!r} is not on a disk that all processes see; set --workdir to one")
