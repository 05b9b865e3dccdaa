"""Files of a run folder: written whole or not at all, read back with their form checked, and their checksums."""

import contextlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jvitmoe.errors import UserError, one_line


def checksum(value: Any) -> str:
    """Returns the CRC-32 of a value's JSON, independent of the order of keys."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


METRICS = "metrics.jsonl"
PART = ".part"  # of a file that is being written
RESULT = "result.json"
CLASSES = "classes.json"
IMAGES = "images.json"
MERGEABILITY = "mergeability.png"


def refuse_links(workdir: Path) -> None:
    """Raises UserError where something in the run folder is a link: writing to it would write to another place, which
    whoever made the folder chose."""
    try:
        links = [path for path in workdir.iterdir() if path.is_symlink()]
    except OSError as error:
        raise UserError(f"workdir {str(workdir)!r} cannot be listed: {error.strerror}; let it be read") from error
    if links:
        raise UserError(
            f"{links[0]} is a link, and what is written to it would lie elsewhere; put its target in its place"
        )


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, through a power cut as well. Raises UserError where it cannot be written."""
    part = path.with_name(path.name + PART)
    try:
        part.unlink(missing_ok=True)
        with part.open("x") as file:  # never through a link that somebody has put there
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise unwritten(path, error) from error


def unwritten(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written: {error.strerror}; make room or let it be written, and give the same command again"
    )


def write_classes(workdir: Path, names: Sequence[str]) -> None:
    """Keeps the names of the classes, in the order of their labels."""
    write_text(workdir / CLASSES, json.dumps(list(names), indent=1) + "\n")


def read_classes(workdir: Path) -> tuple[str, ...]:
    """Returns the names of the classes; () where the run kept none. Raises UserError where the file is damaged."""
    remedy = "delete it, and classes go by number"
    return tuple(read_json(workdir / CLASSES, [str], "a list of names", remedy) or ())


def write_images(workdir: Path, counts: Mapping[str, int]) -> None:
    """Keeps the number of images of each split, by which a run that goes on knows its data again."""
    write_text(workdir / IMAGES, json.dumps(dict(counts)) + "\n")


def read_images(workdir: Path) -> dict[str, int] | None:
    """Returns split -> number of images; None where the run kept none. Raises UserError where the file is damaged."""
    remedy = "delete it if the data are the same"
    counts: dict[str, int] | None = read_json(workdir / IMAGES, {"*": int}, "the numbers of images", remedy)
    return counts


def read_json(path: Path, form: Any, what: str, remedy: str) -> Any:
    """Returns the value in a JSON file; None where there is none. Raises UserError where it cannot be read or does not
    have the form."""
    try:
        value = json.loads(path.read_bytes())
        _check_form(value, form, "the whole")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; let it be read") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {what}: {one_line(error)}; {remedy}") from error
    return value


def _check_form(value: Any, form: Any, name: str) -> None:
    """Raises ValueError for what in a JSON value does not have the form."""
    if isinstance(form, type):
        kinds, number = (float, int) if form is float else (form,), isinstance(value, int)
        fits = type(value) in kinds and not (number and abs(value) >= 2**63)
    else:
        fits = isinstance(value, type(form)) and (len(value) > 0 or isinstance(value, dict))
    if not fits:
        kind = form.__name__ if isinstance(form, type) else f"{type(form).__name__} with entries"
        raise ValueError(f"{name} is {type(value).__name__}, not {kind}")
    if isinstance(form, list):
        for entry in value:
            _check_form(entry, form[0], f"an entry of {name}")
    elif isinstance(form, dict):
        for key in {name.rstrip("?") for name in form} - {"*"}:
            if key in form or value.get(key) is not None:
                _check_form(value.get(key), form.get(key, form.get(f"{key}?")), key)
        for key in (value.keys() - form.keys()) if "*" in form else ():
            _check_form(value[key], form["*"], key)
