"""Which files of a run folder are sound. A checkpoint holds fingerprints of arrays and checksums of other files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jvitmoe import config as config_lib
from jvitmoe.data import datasets
from jvitmoe.errors import UserError
from jvitmoe.runs import files, history, results
from jvitmoe.runs.checkpoints import Checkpoints

SOUND = "sound"


def verify(workdir: Path) -> Iterator[tuple[str, bool, str]]:
    """Yields (checkpoint or file, whether it is sound, finding). Writes nothing.

    Covers the checkpoints and the files that other commands read; `tb/`, `report.md` and the pictures repeat them.
    """
    checkpoints = Checkpoints(workdir / files.CHECKPOINTS)
    steps, meta = checkpoints.steps(), dict[str, Any](step=0)  # meta of the newest sound one
    if not steps:
        yield files.CHECKPOINTS, False, "there is none"
    for step in steps:
        finding = _finding(lambda step=step: meta.update(checkpoints.check(step)))  # type: ignore[misc]
        yield f"checkpoint {step}", finding == SOUND, finding
    for name, check in CHECKS.items():
        if (workdir / name).exists() or name in (files.CONFIG, files.METRICS, *meta.get("files", ())):
            finding = _finding(lambda name=name, check=check: _file(workdir, name, check, meta))  # type: ignore[misc]
            yield name, finding == SOUND, finding


def _finding(check: Callable[[], object]) -> str:
    try:
        check()
    except (UserError, OSError) as error:
        return str(error)
    return SOUND


def _file(workdir: Path, name: str, check: Callable[[Path, dict[str, Any]], object], meta: dict[str, Any]) -> None:
    if not (workdir / name).exists():
        raise UserError("it is missing; restore it from a copy")
    check(workdir, meta)
    expected = meta.get("files", {}).get(name)
    if expected and history.checksums(workdir, meta["step"])[name] != expected:
        raise UserError(f"it does not match its checksum in checkpoint {meta['step']}; restore it from a copy")


def _config(workdir: Path, meta: dict[str, Any]) -> None:
    try:
        config = config_lib.loads((workdir / files.CONFIG).read_text(), files.CONFIG).validate()
    except ValueError as error:  # not UTF-8
        raise UserError(f"it is not the config of a run: {error}") from error
    saved = config_lib.from_dict(meta["config"]) if "config" in meta else config
    if changed := datasets.differences(saved, config):
        raise UserError(f"{', '.join(changed)} differ from checkpoint {meta['step']}; restore it from a copy")


def _metrics(workdir: Path, meta: dict[str, Any]) -> None:
    try:
        lines = [json.loads(text) for text in (workdir / files.METRICS).read_text().splitlines()]
        steps, keys = [line["step"] for line in lines], {(line["step"], line["kind"]) for line in lines}
        if len(keys) < len(lines):
            raise UserError("it has two lines for one step; resuming the training repairs it")
        if steps != sorted(steps):
            raise UserError("its steps are out of order")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"a line is damaged ({type(error).__name__}); resuming the training drops that line") from error


CHECKS: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    files.CONFIG: _config,
    files.METRICS: _metrics,
    files.CLASSES: lambda workdir, _: files.read_classes(workdir),
    files.IMAGES: lambda workdir, _: files.read_images(workdir),
    files.RESULT: lambda workdir, _: results.read_result(workdir),
}
