"""What of a run folder is sound: every checkpoint read whole against its checksums, config, history and result."""

import json
from collections.abc import Iterator
from pathlib import Path

from jvitmoe import config as config_lib
from jvitmoe import tracking
from jvitmoe.checkpoint import Checkpoints
from jvitmoe.config import UserError


def verify(workdir: Path) -> Iterator[tuple[str, str | None]]:
    """Yields (part of the run, what is wrong with it or None), of each part that is there. Changes nothing."""
    yield "config.json", _config(workdir / "config.json")
    if (workdir / tracking.METRICS).exists():
        yield tracking.METRICS, _metrics(workdir / tracking.METRICS)
    if (workdir / tracking.RESULT).exists():
        try:
            tracking.read_result(workdir)
            yield tracking.RESULT, None
        except UserError as error:
            yield tracking.RESULT, str(error)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    if not steps:
        yield "checkpoints", "there is none"
    for step in steps:
        yield f"checkpoint {step}", checkpoints.check(step)
    checkpoints.close()


def _config(path: Path) -> str | None:
    try:
        config_lib.loads(path.read_text(), path.name).validate()
    except (UserError, OSError, ValueError) as error:
        return str(error)
    return None


def _metrics(path: Path) -> str | None:
    try:
        texts = path.read_text().splitlines()
        lines = [json.loads(text) for text in texts]
        places = [(line["step"], line["kind"]) for line in lines]
        if len(set(places)) < len(places):
            return "a step stands in it twice; training again mends it"
        if places != sorted(places, key=lambda place: place[0]):
            return "its steps are out of order"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return f"a line of it is damaged ({type(error).__name__}); training again drops that line"
    return None
