"""Which parts of a run folder are sound. Each checkpoint is read whole and holds the checksums of the other files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jvitmoe import config as config_lib
from jvitmoe.data import datasets
from jvitmoe.errors import UserError
from jvitmoe.runs import files, metrics_log, results
from jvitmoe.runs.checkpoints import Checkpoints


def verify(workdir: Path) -> Iterator[tuple[str, bool, str]]:
    """Yields (part of the run, whether it is sound, what is known of it) and changes nothing.

    Read are the checkpoints and the files that other commands read: not `tb/`, `report.md` and the pictures, which hold
    the same numbers once more.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    steps, sound = checkpoints.steps(), []
    if not steps:
        yield "checkpoints", False, "there is none"
    for step in steps:
        wrong = checkpoints.check(step)
        sound += [] if wrong else [step]
        yield f"checkpoint {step}", not wrong, wrong or "sound"
    meta: dict[str, Any] = checkpoints.read(str(sound[-1])).meta if sound else {"step": 0}
    checkpoints.close()
    parts: dict[str, Callable[[], str]] = {
        "config.json": lambda: _config(workdir / "config.json", meta),
        **{name: lambda name=name: _file(workdir, name, meta) for name in READERS},  # type: ignore[misc]
        files.RESULT: lambda: "sound" if "checksum" in results.read_result(workdir) else UNKNOWN,
    }
    for name, judge in parts.items():
        if (workdir / name).exists() or name in ("config.json", files.METRICS, *meta.get("files", ())):
            try:
                yield name, True, judge()
            except (UserError, OSError) as error:
                yield name, False, str(error)


UNKNOWN = "sound (no checksum)"  # of versions up to 0.1.0


def _config(path: Path, meta: dict[str, Any]) -> str:
    try:
        config = config_lib.loads(path.read_text(), path.name).validate()
    except ValueError as error:  # bytes that are no text
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
    if expected and metrics_log.checksums(workdir, meta["step"])[name] != expected:
        raise UserError(f"it does not match its checksum in checkpoint {meta['step']}; restore it from a copy")
    return "sound" if expected else UNKNOWN


def _metrics(workdir: Path) -> None:
    try:
        lines = [json.loads(text) for text in (workdir / files.METRICS).read_text().splitlines()]
        places = [(line["step"], line["kind"]) for line in lines]
        if len(set(places)) < len(places):
            raise UserError("a step stands in it twice; training again mends it")
        if places != sorted(places, key=lambda place: place[0]):
            raise UserError("its steps are out of order")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"a line of it is damaged ({type(error).__name__}); training again drops that line") from error


READERS: dict[str, Callable[[Path], object]] = {
    files.METRICS: _metrics,
    files.CLASSES: files.read_classes,
    files.IMAGES: files.read_images,
}
