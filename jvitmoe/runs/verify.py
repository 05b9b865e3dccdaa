"""Which files of a run folder are sound. Checkpoints hold the checksums of their arrays and of the other files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jvitmoe import config as config_lib
from jvitmoe.data import datasets
from jvitmoe.errors import UserError
from jvitmoe.runs import files, history, results
from jvitmoe.runs.checkpoints import Checkpoints

UNKNOWN = "sound (no checksum)"  # version 0.1.0 wrote no checksums of these files


def verify(workdir: Path) -> Iterator[tuple[str, bool, str]]:
    """Yields (checkpoint or file, whether it is sound, finding). Writes nothing.

    Covers the checkpoints and the files that other commands read; `tb/`, `report.md` and the pictures repeat them.
    """
    checkpoints = Checkpoints(workdir / files.CHECKPOINTS, shared=False)
    faults = {step: checkpoints.check(step) for step in checkpoints.steps()}
    if not faults:
        yield files.CHECKPOINTS, False, "there is none"
    for step, fault in faults.items():
        yield f"checkpoint {step}", not fault, fault or "sound"
    sound = [step for step, fault in faults.items() if not fault]
    meta: dict[str, Any] = checkpoints.read(str(sound[-1])).meta if sound else {"step": 0}
    checks: dict[str, Callable[[], str]] = {
        files.CONFIG: lambda: _config(workdir / files.CONFIG, meta),
        **{name: lambda name=name: _file(workdir, name, meta) for name in READERS},  # type: ignore[misc]
        files.RESULT: lambda: "sound" if results.read_result(workdir) else "",
    }
    for name, check in checks.items():
        if (workdir / name).exists() or name in (files.CONFIG, files.METRICS, *meta.get("files", ())):
            try:
                yield name, True, check()
            except (UserError, OSError) as error:
                yield name, False, str(error)


def _config(path: Path, meta: dict[str, Any]) -> str:
    try:
        config = config_lib.loads(path.read_text(), path.name).validate()
    except ValueError as error:  # not UTF-8
        raise UserError(f"it is not the config of a run: {error}") from error
    saved = config_lib.from_dict(meta["config"]) if "config" in meta else config
    if changed := datasets.differences(saved, config):
        raise UserError(f"{', '.join(changed)} differ from checkpoint {meta['step']}; restore it from a copy")
    return "sound"


def _file(workdir: Path, name: str, meta: dict[str, Any]) -> str:
    if not (workdir / name).exists():
        raise UserError("it is missing; restore it from a copy")
    READERS[name](workdir)
    expected = meta.get("files", {}).get(name)
    if expected and history.checksums(workdir, meta["step"])[name] != expected:
        raise UserError(f"it does not match its checksum in checkpoint {meta['step']}; restore it from a copy")
    return "sound" if expected else UNKNOWN


def _metrics(workdir: Path) -> None:
    try:
        lines = [json.loads(text) for text in (workdir / files.METRICS).read_text().splitlines()]
        steps, keys = [line["step"] for line in lines], {(line["step"], line["kind"]) for line in lines}
        if len(keys) < len(lines):
            raise UserError("it has two lines for one step; resuming the training repairs it")
        if steps != sorted(steps):
            raise UserError("its steps are out of order")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"a line is damaged ({type(error).__name__}); resuming the training drops that line") from error


READERS: dict[str, Callable[[Path], object]] = {
    files.METRICS: _metrics,
    files.CLASSES: files.read_classes,
    files.IMAGES: files.read_images,
}
