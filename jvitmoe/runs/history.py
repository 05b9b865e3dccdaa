"""The history of a run, metrics.jsonl: one JSON line per step and kind ("train", "validation" or "test")."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvitmoe.errors import UserError
from jvitmoe.runs.files import CLASSES, IMAGES, METRICS, crc32

MOST = 1e300  # a larger figure is damage


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of the file, each step and kind once, without damaged lines; [] if there is no file. Raises
    UserError where it cannot be read. A line has a step, a kind, and figures that are finite or null."""
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    try:
        texts = path.read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    for text in texts:
        try:
            line = json.loads(text)
            step, kind = line["step"], line["kind"]
            figures = [value for name, value in line.items() if name != "kind" and value is not None]
            if type(step) is int and isinstance(kind, str) and all(-MOST <= value <= MOST for value in figures):
                lines.setdefault((step, kind), line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return list(lines.values())


def averaged(runs: Sequence[Mapping[int, float]], most: int) -> tuple[list[int], np.ndarray]:
    """Returns (steps, values [runs, steps]) of at most `most` averages over the steps that all runs have. Each is named
    by its last step."""
    steps = sorted(set.intersection(*map(set, runs)))
    if not steps:
        return [], np.empty((len(runs), 0))
    parts = np.array_split(np.arange(len(steps)), min(len(steps), most))
    values = np.array([[run[step] for step in steps] for run in runs], float)
    return [steps[part[-1]] for part in parts], np.stack([values[:, part].mean(1) for part in parts], 1)


def up_to(workdir: Path, step: int) -> str:
    """Returns the text of the history up to a step."""
    lines = [line for line in read_metrics(workdir / METRICS) if line["step"] <= step]
    return "".join(json.dumps(line) + "\n" for line in lines)


def checksums(workdir: Path, step: int) -> dict[str, str]:
    """Returns name -> CRC-32 of the history up to a step, and of the files that do not change during a run."""
    texts = {name: (workdir / name).read_bytes() for name in (CLASSES, IMAGES) if (workdir / name).is_file()}
    if (workdir / METRICS).exists():
        texts[METRICS] = up_to(workdir, step).encode()
    return {name: crc32(text) for name, text in texts.items()}
